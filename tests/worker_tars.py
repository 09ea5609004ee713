"""Under torchrun: two processes index shards, HOUSE/*.tar. Writes OUT/rank<r>.pt."""

import sys
from pathlib import Path

import torch

from samtune import sources
from samtune.config import TestDataOptions, TrainDataOptions
from samtune.engine import distributed
from samtune.errors import UserError


def main():
    house, out = map(Path, sys.argv[1:])
    process = distributed.start(timeout_minutes=1)
    looked_into, index = [], sources.index_shards
    sources.index_shards = lambda places: looked_into.extend(places) or index(places)
    options = TrainDataOptions(train_shards=f"{house}/train-*.tar", val_shards=f"{house}/val-*.tar")
    indexes = sources.look_into_shards(process, options, TestDataOptions())
    members = {
        flag: [(str(m), m.offset, m.size) for index in part for m in index.members]
        for flag, part in indexes.items()
    }
    mine = list(looked_into)
    try:
        named = f"{house}/val-000000.tar,{house}/missing.tar"
        sources.look_into_shards(process, TrainDataOptions(train_shards=named))
        said = ""
    except UserError as error:
        said = str(error)
    torch.save(
        {"members": members, "looked_into": mine, "said": said}, out / f"rank{process.rank}.pt"
    )
    distributed.shutdown()


if __name__ == "__main__":
    main()

"""The verb `import`: turn a published or the parent's checkpoint into a run of samtune."""

from __future__ import annotations

from dataclasses import fields

import torch
import yaml

from samtune import flags
from samtune.adapters import ADAPTERS, build_model
from samtune.config import ImportConfig
from samtune.engine import distributed
from samtune.engine.checkpoint import load_adapted, save_adapted
from samtune.engine.distributed import Process
from samtune.models.weights import find_checkpoint
from samtune.run_folder import RunFolder, new_name
from samtune.tensor_files import read_state_dict
from samtune.trained import describe


def run(config: ImportConfig, process: Process) -> RunFolder:
    """Write a run's folder whose best state is what `--weights` holds; say what became of it.

    Tensors of the file that differ from the base checkpoint's are kept, also where samtune would
    not train them. Raises UserError if the file does not fit the adapter, with the names.
    """
    with distributed.together():
        options, adapter = config.model, ADAPTERS[config.model.adapter]
        prompt, seed = config.prompts.prompt, config.run.seed
        base = find_checkpoint(options)
        classes = config.read.num_classes
        model = build_model(options, config.adapter, prompt, base, seed, classes)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        loaded = load_adapted(model, config.source.weights, adapter.renames)
        in_file = len(read_state_dict(config.source.weights))
        changed = [n for n in loaded if not torch.equal(before[n], model.state_dict()[n])]
        more = sorted(model.base_keys & set(changed) - trainable_names(model))
        model.base_keys = model.base_keys - set(more)

        name = config.run.output_dir or new_name(options.adapter, options.model_type)
        folder = RunFolder(name)
        folder.create()
        settings = flags.dump([getattr(config, f.name) for f in fields(config)])
        facts = {"epoch": None, "more_keys": more, "imported_from": str(config.source.weights)}
        save_adapted(folder.best, model, describe(model, base, settings) | facts)
        folder.config.write_text(yaml.safe_dump(settings, sort_keys=False))
    if process.is_main:
        print(
            f"{config.source.weights}: {len(loaded)} of {in_file} tensors loaded, "
            f"{in_file - len(loaded)} are aliases; {len(changed)} differ from the base, "
            f"{len(more)} of them in parts that samtune keeps frozen\n"
            f"written: {folder.best}; score it by ./eval.sh --run_dir {folder.path}"
        )
    return folder


def trainable_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}

"""The verb `import`: turn a published or the parent's checkpoint into a run of samtune."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
import yaml
from torch import Tensor

from samtune import flags
from samtune.adapters import ADAPTERS, build_model, published
from samtune.config import ImportConfig, ModelOptions, Size
from samtune.engine import distributed
from samtune.engine.checkpoint import load_published, renamed, save_adapted
from samtune.engine.distributed import Process
from samtune.errors import UserError
from samtune.models.sam import resolve_model_type
from samtune.models.segmenter import PromptedSam
from samtune.models.weights import find_checkpoint, model_types_like
from samtune.run_folder import RunFolder, new_name
from samtune.tensor_files import read_state_dict
from samtune.trained import describe

NEW, CHANGED, EQUAL = "loaded, new", "loaded, not the base's", "loaded, equal to the base's"
ALIAS, UNREAD, FROM_BASE = "the same tensor again", "read by nothing", "not in the file: the base's"


@dataclass(frozen=True)
class Published:
    """A file of others, read. names: our name for each of its own, None where nothing reads it.

    tensors: by our names.
    """

    path: str
    names: dict[str, str | None]
    tensors: dict[str, Tensor]

    @property
    def shapes(self) -> published.Shapes:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def run(config: ImportConfig, process: Process) -> RunFolder:
    """Write a run's folder whose best state is what `--weights` holds; say what became of it.

    Tensors of the file that differ from the base checkpoint's are kept, also where samtune would
    not train them. Raises UserError if the file does not fit the flags, with those that would.
    """
    with distributed.together():
        file = read_published(config.source.weights, config.model.adapter)
        config = fit(config, file)
        base = find_checkpoint(config.model)
        model = build_model(
            config.model, config.adapter, config.prompts.prompt, base, config.run.seed,
            config.read.num_classes,
        )  # fmt: skip
        fates, changed = _load(model, file, based=base is not None)
        more = sorted(model.base_keys & changed - trainable_names(model))
        model.base_keys = model.base_keys - set(more)

        options = config.model
        folder = RunFolder(config.run.output_dir or new_name(options.adapter, options.model_type))
        folder.create()
        settings = flags.dump([getattr(config, f.name) for f in fields(config)])
        facts = {"epoch": None, "more_keys": more, "imported_from": file.path}
        save_adapted(folder.best, model, describe(model, base, settings) | facts)
        folder.config.write_text(yaml.safe_dump(settings, sort_keys=False))
        folder.imported.write_text(_table(file, model, fates))
    if process.is_main:
        counts = Counter(fates[key] for key in file.names)
        told = "\n".join(f"{count:6} {fate}" for fate, count in counts.items())
        print(
            f"{file.path}: {len(file.names)} tensors for --adapter {options.adapter}\n{told}\n"
            f"{len(more):6} of those that differ lie in parts that samtune keeps frozen\n"
            f"every tensor by name: {folder.imported}\n"
            f"written: {folder.best}; score it by ./eval.sh --run_dir {folder.path}"
        )
    return folder


def trainable_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def read_published(path: str, adapter: str) -> Published:
    """Read a file under its own names and find ours.

    Raises UserError where it is no such file, belongs to another adapter, or holds different
    tensors under names of the same one.
    """
    if not path:
        raise UserError("--weights is not set: name the file to import")
    given = read_state_dict(path)
    made_by = published.made_by(given)
    if made_by and made_by[0] != adapter:
        raise UserError(f"{path} holds what --adapter {made_by[0]} has: say so")
    theirs = published.hugging_face_renames(given)
    names, tensors = {}, {}
    for key, tensor in given.items():
        name = names[key] = renamed(renamed(key, theirs), ADAPTERS[adapter].renames)
        if name is not None and not torch.equal(tensors.setdefault(name, tensor), tensor):
            raise UserError(f"{path} holds two different tensors for {name}, {key} for one")
    return Published(path, names, tensors)


def fit(config: ImportConfig, file: Published) -> ImportConfig:
    """The config with what the file shows where a flag has its default.

    Raises UserError where file and flags contradict each other, with the flags to add.
    """
    options = _fit_frame(_fit_classes(config, file), file)
    asked, default = config.adapter, type(config.adapter)()
    made_by = published.made_by(file.names)
    shown = (made_by[1] if made_by else {}) | published.options_shown(options.adapter, file.shapes)
    for name, value in shown.items():
        if getattr(asked, name) not in (value, getattr(default, name)):
            raise UserError(
                f"{file.path} was made with --{name} {value}, --{name} {getattr(asked, name)} "
                "does not fit it"
            )
    return replace(config, model=options, adapter=replace(asked, **shown))


def _fit_classes(config: ImportConfig, file: Published) -> ModelOptions:
    """The model's options with the layout of the file's classes."""
    options, read, prompt = config.model, config.read, config.prompts.prompt
    row = resolve_model_type(options.model_type)
    like = model_types_like(file.tensors)
    if like and options.model_type not in like:
        raise UserError(
            f"{file.path} holds another size of SAM than {options.model_type}: add --model_type "
            f"{like[0]}"
        )
    shown = dict(published.classes_shown(file.shapes, row.multimask_outputs + 1))
    classes = read.num_classes if prompt == "none" else 1
    if shown and classes not in shown:
        held = min(shown)
        holds = f"{held} masks, a class each" if held > 1 else "one mask"
        add = f"--num_classes {held} --prompt none" if held > 1 else "--num_classes 1"
        raise UserError(
            f"{file.path} answers with {holds}, which is not --num_classes {read.num_classes} "
            f"under --prompt {prompt}: add {add}"
        )
    return replace(options, class_layout=shown.get(classes) or options.class_layout)


def _fit_frame(options: ModelOptions, file: Published) -> ModelOptions:
    """The model's options with the size of frames that the file's position tables are made for."""
    adapter, row = ADAPTERS[options.adapter], resolve_model_type(options.model_type)
    frame = None if adapter.any_size else published.frame_shown(file.shapes, row, adapter.stride)
    if frame is None:
        return options
    size = Size(*frame)
    if options.image_size not in (Size(0, 0), size):
        raise UserError(
            f"{file.path} is made for frames of {size} px, --image_size {options.image_size} does "
            "not fit it"
        )
    return replace(options, image_size=size)


def _load(model: PromptedSam, file: Published, based: bool) -> tuple[dict[str, str], set[str]]:
    """Load; what became of each of the file's names, and our names of what the base holds unlike.

    based: whether the model began from a base checkpoint.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    missing = [name for name in before if name not in file.tensors]
    if missing and not based and file.tensors.keys() <= before.keys():
        raise UserError(
            f"{file.path} lacks {len(missing)} of the model's tensors, {missing[0]} for one, and "
            "there is no base to take them from: add --checkpoint with SAM's own weights"
        )
    load_published(model, file.path, file.tensors)
    after = model.state_dict()
    changed = {name for name in file.tensors if not torch.equal(before[name], after[name])}
    fates: dict[str, str] = {}
    seen = set()
    for key, name in file.names.items():
        if name is None:
            fates[key] = UNREAD
        elif name in seen:
            fates[key] = ALIAS
        elif name not in model.base_keys:
            fates[key] = NEW
        else:
            fates[key] = CHANGED if name in changed else EQUAL
        seen.add(name)
    return fates, changed


def _table(file: Published, model: PromptedSam, fates: Mapping[str, str]) -> str:
    """A line per tensor of the file, then per tensor of ours that it does not hold."""
    lines = [("in the file", "here", "what became of it")]
    lines += [(key, name or "-", fates[key]) for key, name in file.names.items()]
    lines += [("-", n, FROM_BASE) for n in model.state_dict() if n not in file.tensors]
    return "".join("\t".join(line) + "\n" for line in lines)

"""What modules were called in version 0.1, when `edt/` was one folder: by these names they are found still."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FORMER = {  # to several, where it was parted
    "ablate": "demo.ablation",
    "alignment": "train.alignment",
    "checkpoint": "runs.weights",
    "complexity": "model.complexity",
    "config": "model.presets",
    "convert": "sampling.conversion",
    "cuda_graph": "diffusion.cuda_graph",
    "digits": "data.digits demo.judge",
    "evaluate": "evaluation.evaluator",
    "extract": "data.extraction",
    "file_errors": "files.errors",
    "image_files": "data.image_files",
    "image_sets": "evaluation.image_sets",
    "layers": "model.layers",
    "masking": "model.masking",
    "metrics": "evaluation.metrics",
    "objective": "train.objective",
    "outputs": "files.outputs",
    "pipeline": "sampling.pipeline",  # that name is in saved folders, for `trust_remote_code`
    "plots": "data.pictures",
    "randomness": "train.randomness",
    "run_checkpoint": "runs.checkpoint",
    "run_folder": "runs.folder files.lock",
    "run_log": "runs.log",
    "run_plots": "runs.plots",
    "sample_set": "sampling.sample_set",
    "shards": "data.shards",
    "sources": "data.sources",
    "step_cache": "model.step_cache",
    "task_routing": "model.task_routing",
    "text_files": "files.text",
    "train_config": "train.config",
    "train_preview": "train.preview",
    "train_state": "train.state",
    "vae": "data.vae",
}
# Modules whose names are folders' today: what was in them is handed on there.
REPLACED = {
    "data": "data.dataset",
    "demo": "demo.run",
    "diffusion": "diffusion.process",
    "model": "model.transformer model.layers",
    "sampling": "diffusion.sampler",
    "train": "train.trainer",
}


def _todays(name: str) -> list[str]:
    """The modules that a former one is today; none for another name."""
    found = (FORMER | REPLACED).get(name.rpartition(".")[2], "")
    return [f"{__package__}.{today}" for today in found.split()]


class _Former(ModuleType):
    """In a former module's place: what is set here, as tests do, is set where it is used; `del` sets it back."""

    def __setattr__(self, name, value):
        for names in _names_of_today(self, name):
            vars(self).setdefault("__before__", {}).setdefault((id(names), name), names[name])
            names[name] = value
        super().__setattr__(name, value)

    def __delattr__(self, name):
        for names in _names_of_today(self, name):
            names[name] = vars(self).get("__before__", {}).get((id(names), name), names[name])
        super().__delattr__(name)


def _names_of_today(module: ModuleType, name: str) -> list[dict]:
    """The namespaces that have a name of the former module, of those that are loaded."""
    loaded = (sys.modules[today] for today in _todays(module.__name__) if today in sys.modules)
    return [vars(today) for today in loaded if name in vars(today)]


class _FormerModules(MetaPathFinder, Loader):
    """Names modules that are no files any more, and nothing else."""

    def find_spec(self, name, path=None, target=None):
        package, _, module = name.rpartition(".")
        return ModuleSpec(name, self) if package == __package__ and module in FORMER else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        todays = _todays(module.__name__)
        warnings.warn(f"{module.__name__} is {' and '.join(todays)} now", DeprecationWarning, stacklevel=2)
        parts = [importlib.import_module(today) for today in todays]
        if len(parts) == 1:
            sys.modules[module.__name__] = parts[0]  # which import returns in `module`'s place
        for part in parts:
            vars(module).update((name, value) for name, value in vars(part).items() if not name.startswith("__"))
        module.__class__ = _Former


def install() -> None:
    """Lets `import` find the former modules, also where edt is loaded again."""
    sys.meta_path[:] = [
        _FormerModules(),
        *(f for f in sys.meta_path if type(f).__name__ != _FormerModules.__name__),
    ]


def stand_in(package: str) -> None:
    """Makes a folder that has a former module's name stand in for it."""
    if _todays(package):
        sys.modules[package].__class__ = _Former


def former_name(package: str, name: str):
    """What the module that had the name of this folder called so; AttributeError if nothing."""
    for today in map(importlib.import_module, _todays(package)):
        if hasattr(today, name):
            warnings.warn(f"{package}.{name} is in {today.__name__} now", DeprecationWarning, stacklevel=3)
            return getattr(today, name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")

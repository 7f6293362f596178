"""Optimisers by name, and learning rates over a training run.

Names and options are those of musubi-tuner; schedules are those of `transformers.get_scheduler` as pure functions of
the step, so that a resumed run needs no scheduler state.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

DEFAULT_LEARNING_RATE = 1e-4
NAMES = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor",
    "prodigy": "prodigyopt.Prodigy",
    "schedulefree": "schedulefree.AdamWScheduleFree",
}
"""Short names, in lower case and without - and _."""
KNOWN_MODULES = ("torch.optim", "bitsandbytes.optim", "schedulefree", "prodigyopt", "transformers.optimization")
"""Their optimisers may be named without `allow_dotted`, in any case."""
SCHEDULE_FREE_SCHEDULERS = ("constant", "constant_with_warmup")

LearningRateScheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "inverse_sqrt",
    "rex",
]
REFUSED_SCHEDULERS = {
    "piecewise_constant": "use warmup_stable_decay or cosine_with_restarts",
    "adafactor": "use lr_scheduler constant; optimizer_type adafactor takes the learning rate that is given",
    "reduce_lr_on_plateau": "it depends on the losses of the past; use cosine or rex",
    "greedy": "it depends on the losses of the past; use cosine or rex",
    "cosine_warmup_with_min_lr": "use cosine_with_min_lr",
}
REX_MIN_RATIO = 0.01


def one_cycle(step: int, num_steps: int, num_warmup_steps: int) -> float:
    """The factor of the learning rate: linear up over the warm-up, times a cosine from 1 to 0 over all steps."""
    warmup = min(1.0, (step + 1) / num_warmup_steps)
    return warmup * 0.5 * (1 + math.cos(math.pi * step / num_steps))


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over a run."""

    lr_scheduler: LearningRateScheduler = "constant"
    lr_warmup_steps: int | float | str = 0
    """Steps of linear warm-up; below 1, or as text with %, a share of the run. Step 0 of a warm-up has rate 0."""
    lr_decay_steps: int | float | str = 0
    """Steps at the end in which warmup_stable_decay falls; as lr_warmup_steps."""
    lr_scheduler_num_cycles: int = 1
    """Restarts of cosine_with_restarts; half waves of cosine_with_min_lr and warmup_stable_decay."""
    lr_scheduler_power: float = 1.0
    """Of polynomial."""
    lr_scheduler_timescale: int | None = None
    """Of inverse_sqrt, in steps; None: the warm-up, or 10000 without one."""
    lr_scheduler_min_lr_ratio: float | None = None
    """The lowest rate as a share of the highest, 0..1: needed by cosine_with_min_lr; of warmup_stable_decay and
    polynomial (None: 0) and of rex (None: 0.01)."""

    def __post_init__(self) -> None:
        name = self.lr_scheduler
        if name not in get_args(LearningRateScheduler):
            advice = REFUSED_SCHEDULERS.get(name, f"use one of {', '.join(get_args(LearningRateScheduler))}")
            raise ValueError(f"lr_scheduler {name!r} is not available; {advice}")
        used_by = {
            "lr_warmup_steps": name != "constant",
            "lr_decay_steps": name == "warmup_stable_decay",
            "lr_scheduler_num_cycles": name in ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
            "lr_scheduler_power": name == "polynomial",
            "lr_scheduler_timescale": name == "inverse_sqrt",
            "lr_scheduler_min_lr_ratio": name in ("cosine_with_min_lr", "warmup_stable_decay", "polynomial", "rex"),
        }
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            given = value != field.default
            if field.name.endswith("_steps"):
                given = _count_or_share(field.name, value) != 0
            if given and not used_by[field.name]:
                advice = "use constant_with_warmup" if field.name == "lr_warmup_steps" else "leave it out"
                raise ValueError(f"{field.name} is {value}, which has no effect with lr_scheduler {name}; {advice}")
        if self.lr_scheduler_num_cycles < 1:
            raise ValueError(f"lr_scheduler_num_cycles is {self.lr_scheduler_num_cycles}; it must be 1 or more")
        if not 0 < self.lr_scheduler_power < math.inf:
            raise ValueError(f"lr_scheduler_power is {self.lr_scheduler_power}; it must be above 0")
        if self.lr_scheduler_timescale is not None and self.lr_scheduler_timescale < 1:
            raise ValueError(f"lr_scheduler_timescale is {self.lr_scheduler_timescale}; it must be 1 step or more")
        ratio = self.lr_scheduler_min_lr_ratio
        if ratio is not None and not 0 <= ratio < 1:
            raise ValueError(f"lr_scheduler_min_lr_ratio is {ratio}; it must lie in 0..1, such as 0.1")
        if name == "cosine_with_min_lr" and ratio is None:
            raise ValueError("cosine_with_min_lr needs lr_scheduler_min_lr_ratio, such as 0.1")
        if name == "warmup_stable_decay" and _count_or_share("lr_decay_steps", self.lr_decay_steps) == 0:
            raise ValueError("warmup_stable_decay needs lr_decay_steps, such as 20%")


def _count_or_share(name: str, value: int | float | str) -> int | float:
    """A number of steps as int, or a share of the run as float below 1."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    is_share = text.endswith("%") or not number.is_integer()
    share = number / 100 if text.endswith("%") else number
    if not (0 <= number < math.inf) or (is_share and not share < 1):
        raise ValueError(f"{name} is {value!r}; give a number of steps, a share below 1, or a share such as 10%")
    return share if is_share else int(number)


def _num_steps_of(name: str, value: int | float | str, num_steps: int) -> int:
    parsed = _count_or_share(name, value)
    return parsed if isinstance(parsed, int) else round(parsed * num_steps)


def learning_rate_factor(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """The learning rate of a step as a multiple of the highest one.

    Formulas: `transformers.get_scheduler` (5.23) with the arguments that musubi-tuner passes on; rex of Chen et al.
    2021 (arXiv 2107.04197) with musubi-tuner's constants, on the steps after the warm-up.

    Args:
        step: optimiser step, 0..num_steps.

    Raises:
        ValueError: warm-up and decay are longer than the run.
    """
    warmup = _num_steps_of("lr_warmup_steps", config.lr_warmup_steps, num_steps)
    decay = _num_steps_of("lr_decay_steps", config.lr_decay_steps, num_steps)
    if warmup + decay > num_steps:
        raise ValueError(
            f"a warm-up of {warmup} and a decay of {decay} steps do not fit into {num_steps} steps; give fewer"
        )
    min_ratio = config.lr_scheduler_min_lr_ratio or 0.0
    if config.lr_scheduler == "warmup_stable_decay":
        return min_ratio + (1 - min_ratio) * _stable_decay(step, num_steps, warmup, decay, config)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    match config.lr_scheduler:
        case "constant" | "constant_with_warmup":
            return 1.0
        case "linear":
            return 1 - progress
        case "cosine":
            return _cosine(progress)
        case "cosine_with_restarts":
            return _cosine(config.lr_scheduler_num_cycles * progress % 1.0) if progress < 1 else 0.0
        case "polynomial":
            return min_ratio + (1 - min_ratio) * (1 - progress) ** config.lr_scheduler_power
        case "cosine_with_min_lr":
            return min_ratio + (1 - min_ratio) * _cosine(config.lr_scheduler_num_cycles * progress)
        case "inverse_sqrt":
            timescale = config.lr_scheduler_timescale or warmup or 10_000
            return ((step - warmup + timescale) / timescale) ** -0.5
        case "rex":
            ratio = REX_MIN_RATIO if config.lr_scheduler_min_lr_ratio is None else min_ratio
            return ratio + (1 - ratio) * (1 - progress) / (0.1 + 0.9 * (1 - progress))
    raise AssertionError(config.lr_scheduler)


def _stable_decay(step: int, num_steps: int, warmup: int, decay: int, config: ScheduleConfig) -> float:
    if step < warmup:
        return step / warmup
    if step < num_steps - decay:
        return 1.0
    if step >= num_steps:
        return 0.0
    return _cosine(config.lr_scheduler_num_cycles * (step - num_steps + decay) / decay)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimiser, as in musubi-tuner."""

    optimizer_type: str = "adamw"
    """adamw, adamw8bit, adafactor, prodigy, schedulefree, the name of a class of torch.optim, of an 8-bit class of
    bitsandbytes or of a schedule-free one, or where that is allowed the dotted name of an installed class."""
    learning_rate: float | None = None
    """None: 1 for prodigy, which finds the rate itself, else 1e-4. See `rate`."""
    optimizer_args: tuple[str, ...] = ()
    """More arguments of the class as ``name=value``, values as Python literals: ``betas=(0.9, 0.99)``."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this norm; 0 leaves them alone."""

    def __post_init__(self) -> None:
        if not self.optimizer_type.strip():
            raise ValueError(f"optimizer_type is empty; use one of {', '.join(NAMES)}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be a number above 0, such as 1e-4")
        if not 0 <= self.max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; it must be 0 (off) or above, such as 1")
        parse_arguments(self.optimizer_args)

    @property
    def rate(self) -> float:
        """The highest learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if _plain(self.optimizer_type).startswith("prodigy") else DEFAULT_LEARNING_RATE

    @property
    def is_schedule_free(self) -> bool:
        """Whether it averages its own steps instead of following a falling learning rate."""
        return "schedulefree" in _plain(self.optimizer_type)


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """The values of ``name=value``, each a Python literal (True, 0.1, (0.9, 0.99), None, 'text').

    Raises:
        ValueError: one is not of this form, or the learning rate is among them.
    """
    arguments = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            raise ValueError(f"optimizer_args has {text!r}; write name=value, such as weight_decay=0.01")
        if name in ("lr", "params"):
            raise ValueError(f"optimizer_args has {text!r}; give learning_rate instead")
        try:
            arguments[name] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
            raise ValueError(
                f"optimizer_args has {text!r}; the value must be a Python literal such as 0.01, True or (0.9, 0.99)"
            ) from error
    return arguments


def find_optimizer(config: OptimizerConfig, *, allow_dotted: bool = False) -> tuple[type[Any], dict[str, Any]]:
    """The class of an optimiser and its arguments but for parameters and learning rate; nothing is built yet.

    Args:
        allow_dotted: whether any installed class may be named. Importing a module runs its code, so that a stranger's
            settings could run what is installed here. Only packages that pip installed are imported, no file beside
            the settings or in the working directory and no private module, and only subclasses of
            `torch.optim.Optimizer` are called. Leave it off where settings come in unseen, as in shared graphs.

    Raises:
        ValueError: there is no such optimiser, its package is missing, or it does not take these arguments.
    """
    kind = _optimizer_class(config.optimizer_type.strip(), allow_dotted)
    arguments = parse_arguments(config.optimizer_args)
    if kind.__module__ == "transformers.optimization":
        if arguments.get("relative_step") or arguments.get("warmup_init"):
            raise ValueError(
                "relative_step and warmup_init of adafactor replace the learning rate by one of its own; set them to "
                "False or leave them out, and give learning_rate and lr_scheduler"
            )
        arguments = {"relative_step": False, "scale_parameter": False, **arguments}
    signature = inspect.signature(kind)
    try:
        signature.bind([], lr=config.rate, **arguments)
    except TypeError as error:
        allowed = ", ".join(name for name in signature.parameters if name not in ("params", "lr"))
        raise ValueError(f"{kind.__name__}: {error}; its optimizer_args are {allowed}") from error
    return kind, arguments


def make_optimizer(
    parameter_groups: Sequence[dict[str, Any]], config: OptimizerConfig, *, allow_dotted: bool = False
) -> Optimizer:
    """The optimiser of these parameter groups; every group has its highest rate as ``initial_lr``.

    Args:
        parameter_groups: at least ``params``; a ``lr`` of their own replaces that of the settings.
        allow_dotted: as for `find_optimizer`.

    Raises:
        ValueError: as `find_optimizer`, or the optimiser does not run on this device or with these values.
    """
    kind, arguments = find_optimizer(config, allow_dotted=allow_dotted)
    groups = [{**group, "params": list(group["params"])} for group in parameter_groups]
    devices = {parameter.device for group in groups for parameter in group["params"]}
    if kind is torch.optim.AdamW and not {"fused", "foreach", "capturable"} & arguments.keys():
        arguments["fused"] = {device.type for device in devices} <= {"cpu", "cuda"}
    if kind.__module__.startswith("prodigyopt") and len({group.get("lr", config.rate) for group in groups}) > 1:
        raise ValueError("prodigy finds one learning rate for all; leave out loraplus_lr_ratio")
    try:
        optimizer = kind(groups, lr=config.rate, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{kind.__name__} refuses its settings, {arguments}: {error}") from error
    for device in devices:
        _try_one_step(kind, arguments, device)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def check_schedule(optimizer: OptimizerConfig, schedule: ScheduleConfig) -> None:
    """Refuses schedules that an optimiser does not work with.

    Raises:
        ValueError: the learning rate of a schedule-free optimiser would fall.
    """
    if optimizer.is_schedule_free and schedule.lr_scheduler not in SCHEDULE_FREE_SCHEDULERS:
        raise ValueError(
            f"{optimizer.optimizer_type} needs no falling learning rate; with lr_scheduler {schedule.lr_scheduler} it "
            f"would learn less; use {' or '.join(SCHEDULE_FREE_SCHEDULERS)}"
        )


def set_training(optimizer: Optimizer, training: bool) -> None:
    """Puts schedule-free optimisers into training or evaluation; there is nothing to do for others.

    They must be in training to step; in evaluation the parameters are the averaged ones.
    """
    switch = getattr(optimizer, "train" if training else "eval", None)
    if callable(switch):
        switch()


@contextmanager
def evaluation_weights(optimizer: Optimizer) -> Iterator[None]:
    """The parameters as they are to be saved and sampled with: for schedule-free optimisers the averaged ones.

    Afterwards the parameters have the same bits as before: switching to and fro by `set_training` rounds, and a run
    that saves would end elsewhere than one that does not.
    """
    if not callable(getattr(optimizer, "eval", None)):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    set_training(optimizer, False)
    try:
        yield
    finally:
        set_training(optimizer, True)
        _write(parameters, kept)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").strip()


def _optimizer_class(name: str, allow_dotted: bool) -> type[Any]:
    path = NAMES.get(_plain(name), name)
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        module_name = _module_of_short_name(name)
    if module_name in KNOWN_MODULES:
        module = _import(module_name, name)
        classes = {_plain(key): value for key, value in vars(module).items() if _is_optimizer(value)}
        kind = classes.get(_plain(class_name))
    elif not allow_dotted:
        raise ValueError(
            f"optimizer_type {name!r} names a class of {module_name}, which is not allowed here; use one of "
            f"{', '.join(NAMES)}, or train from the command line"
        )
    else:
        _refuse_what_pip_did_not_install(module_name, name)
        kind = getattr(_import(module_name, name), class_name, None)
    if not _is_optimizer(kind):
        raise ValueError(
            f"optimizer_type {name!r} is no optimiser of {module_name}; use one of {', '.join(NAMES)}, or the name of "
            "a class of torch.optim"
        )
    needed = [p for p in list(inspect.signature(kind.step).parameters.values())[1:] if p.default is p.empty]
    if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in needed):
        raise ValueError(f"optimizer_type {name!r} computes the loss several times a step; use another")
    return kind


def _module_of_short_name(name: str) -> str:
    plain = _plain(name)
    if "schedulefree" in plain:
        return "schedulefree"
    if plain.endswith(("8bit", "32bit")) or plain.startswith("paged"):
        return "bitsandbytes.optim"
    return "torch.optim"


def _is_optimizer(value: Any) -> TypeGuard[type[Any]]:
    return inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer


def _import(module_name: str, asked: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        package = module_name.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ValueError(
                f"optimizer_type {asked!r} needs the package {package}; run: pip install {package}"
            ) from error
        raise ValueError(f"optimizer_type {asked!r}: {module_name} cannot be imported: {error}") from error


def _refuse_what_pip_did_not_install(module_name: str, asked: str) -> None:
    top, *inner = module_name.split(".")
    if not all(part.isidentifier() for part in (top, *inner)) or any(part.startswith("_") for part in (top, *inner)):
        raise ValueError(f"optimizer_type {asked!r} is no dotted name of a public class, such as package.module.Class")
    distributions = importlib.metadata.packages_distributions().get(top, [])
    if not distributions:
        raise ValueError(f"optimizer_type {asked!r} needs the package {top}; install it with pip")
    spec = importlib.util.find_spec(top)
    origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
    roots = [Path(str(importlib.metadata.distribution(name).locate_file(""))).resolve() for name in distributions]
    if origin is None or not any(origin.is_relative_to(root) for root in roots):
        raise ValueError(
            f"optimizer_type {asked!r}: Python would import {top} from {origin}, which is not what pip installed; "
            "rename that file or start from another folder"
        )


def _try_one_step(kind: type[Any], arguments: Mapping[str, Any], device: torch.device) -> None:
    """What an optimiser needs of gradients, and bitsandbytes of the device, shows in a step, not in the import."""
    if device.type == "cpu" and (kind.__name__.startswith("Paged") or arguments.get("is_paged")):
        raise ValueError(f"{kind.__name__} pages between GPU and host memory; use adamw on the CPU")
    parameter = torch.nn.Parameter(torch.zeros(128, 128, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer = kind([parameter], lr=DEFAULT_LEARNING_RATE, **arguments)
        set_training(optimizer, True)
        optimizer.step()
    except Exception as error:
        raise ValueError(f"{kind.__name__} cannot train a LoRA on {device}: {error}; use adamw") from error


def effective_rate(optimizer: Optimizer) -> float:
    """The learning rate of the first group as it acts: for prodigy times the factor that it has found."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))


class Ema:
    """Exponential moving average of parameters, in fp32 on their device.

    The decay of update n (counted from 1) is ``min(decay, (1 + n) / (10 + n))``: early on the average follows
    quickly, so that the first weights do not stay in it.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay of the moving average is {decay}; it must lie between 0 and 1, such as 0.999")
        self.decay = decay
        self.averages = [parameter.detach().float().clone() for parameter in parameters]
        device = self.averages[0].device if self.averages else None
        self.num_updates = torch.zeros((), dtype=torch.int64, device=device)
        """``[]``, on the device, as only the device may know whether a step was taken."""

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], is_taken: Tensor | None = None) -> None:
        """Takes the parameters of now into the average; call it after every step of the optimiser.

        Args:
            is_taken: bool ``[]`` on the device; where it is False nothing changes. None: the step was taken.
        """
        self.num_updates += 1 if is_taken is None else is_taken
        weight = (9 / (10 + self.num_updates)).clamp_min(1 - self.decay)
        if is_taken is not None:
            weight = weight * is_taken
        # Few kernels for many small tensors: average + weight * (parameter - average).
        foreach: Any = torch
        changes = foreach._foreach_sub([parameter.detach().float() for parameter in parameters], self.averages)
        foreach._foreach_mul_(changes, weight)
        foreach._foreach_add_(self.averages, changes)

    @contextmanager
    def swapped_in(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """The parameters are the average inside of the block, and afterwards what they were, bit for bit."""
        parameters = list(parameters)
        kept = [parameter.detach().clone() for parameter in parameters]
        _write(parameters, self.averages)
        try:
            yield
        finally:
            _write(parameters, kept)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on; the averages are not copied."""
        return {"num_updates": int(self.num_updates), "averages": list(self.averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: it belongs to other parameters.
        """
        averages = list(state["averages"])
        if [value.shape for value in averages] != [value.shape for value in self.averages]:
            raise ValueError("the moving average in this state belongs to other parameters; resume with its settings")
        self.num_updates.fill_(int(state["num_updates"]))
        _write(self.averages, averages)


@torch.no_grad()
def _write(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)

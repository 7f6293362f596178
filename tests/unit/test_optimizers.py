"""Optimisers by name, learning rates against transformers, resuming each of them, and the moving average."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from copy import deepcopy
from importlib import metadata

import pytest
import torch
from flux2_kit.training import optimizers
from flux2_kit.training.optimizers import (
    Ema,
    OptimizerConfig,
    ScheduleConfig,
    check_schedule,
    effective_rate,
    evaluation_weights,
    find_optimizer,
    learning_rate_factor,
    make_optimizer,
    set_training,
)
from flux2_kit.training.train_state import load_tree, save_tree
from packaging.version import Version
from torch import Tensor, nn

INSTALLED = {name for name in ("bitsandbytes", "prodigyopt", "schedulefree") if importlib.util.find_spec(name)}
TYPES = {
    "adamw": None,
    "torch.optim.SGD": None,
    "RAdam": None,
    "adafactor": None,
    "AdamW8bit": "bitsandbytes",
    "prodigy": "prodigyopt",
    "schedulefree": "schedulefree",
    "RAdamScheduleFree": "schedulefree",
}


def needs(package: str | None) -> None:
    if package is not None and package not in INSTALLED:
        pytest.skip(f"{package} is not installed")


class Run:
    """Two matrices that learn to be an orthogonal map; large enough that 8-bit states are in 8 bits."""

    def __init__(self, optimizer_type: str, *, groups: list[dict] | None = None, **settings) -> None:
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(32, 128, generator=generator) / 12)
        self.up = nn.Parameter(torch.randn(128, 32, generator=generator) / 12)
        config = OptimizerConfig(optimizer_type=optimizer_type, **settings)
        self.optimizer = make_optimizer(groups or [{"params": [self.down]}, {"params": [self.up]}], config)
        set_training(self.optimizer, True)

    def loss(self, step: int) -> Tensor:
        batch = torch.randn(16, 128, generator=torch.Generator().manual_seed(step))
        return (batch @ self.down.T @ self.up.T - batch.flip(1)).square().mean()

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * (1 - step / 100)
            self.loss(step).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        return [self.down.detach(), self.up.detach()]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", TYPES)
def test_every_optimiser_learns_and_resumes_bit_for_bit(name, tmp_path):
    needs(TYPES[name])
    if name == "AdamW8bit" and Version(version := metadata.version("bitsandbytes")) < Version("0.50"):
        pytest.skip(f"8-bit optimisers of bitsandbytes {version} need a GPU")
    whole, first, second = (Run(name, learning_rate=None if name == "prodigy" else 0.01) for _ in range(3))
    loss_before = whole.loss(1000).item()
    whole.train(0, 30)
    first.train(0, 13)
    save_tree(tmp_path / "state.safetensors", [first.optimizer.state_dict(), first.weights()])
    state, weights = load_tree(tmp_path / "state.safetensors")
    with torch.no_grad():
        for parameter, value in zip((second.down, second.up), weights, strict=True):
            parameter.copy_(value)
    second.optimizer.load_state_dict(state)
    second.train(13, 30)
    for resumed, uninterrupted in zip(second.weights(), whole.weights(), strict=True):
        assert torch.equal(resumed, uninterrupted)
    assert whole.loss(1000).item() < loss_before * 0.999


@pytest.mark.parametrize(
    ("name", "package", "expected"),
    [
        ("AdamW", None, "torch.optim.AdamW"),
        ("ADAMW", None, "torch.optim.AdamW"),
        ("torch.optim.adamw", None, "torch.optim.AdamW"),
        ("sgd", None, "torch.optim.SGD"),
        ("Adafactor", None, "transformers.optimization.Adafactor"),
        ("torch.optim.Adafactor", None, "torch.optim.Adafactor"),
        ("adamw_8bit", "bitsandbytes", "bitsandbytes.optim.AdamW8bit"),
        ("PagedAdamW8bit", "bitsandbytes", "bitsandbytes.optim.PagedAdamW8bit"),
        ("bitsandbytes.optim.Lion8bit", "bitsandbytes", "bitsandbytes.optim.Lion8bit"),
        ("Prodigy", "prodigyopt", "prodigyopt.Prodigy"),
        ("prodigyopt.Prodigy", "prodigyopt", "prodigyopt.Prodigy"),
        ("AdamWScheduleFree", "schedulefree", "schedulefree.AdamWScheduleFree"),
        ("schedule-free", "schedulefree", "schedulefree.AdamWScheduleFree"),
        ("schedulefree.SGDScheduleFree", "schedulefree", "schedulefree.SGDScheduleFree"),
    ],
)
def test_names_of_musubi_lead_to_the_class_in_any_case(name, package, expected):
    needs(package)
    kind, _ = find_optimizer(OptimizerConfig(optimizer_type=name))
    module, _, class_name = expected.rpartition(".")
    assert kind is getattr(importlib.import_module(module), class_name)


def test_arguments_are_literals_and_reach_the_optimiser():
    run = Run("adamw", optimizer_args=("weight_decay=0.3", "betas=0.8,0.95", "amsgrad=True", "eps = 1e-6"))
    group = run.optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["amsgrad"], group["eps"]) == (0.3, (0.8, 0.95), True, 1e-6)
    assert group["lr"] == group["initial_lr"] == 1e-4
    assert group["fused"] is True
    assert Run("adamw", optimizer_args=("fused=False",)).optimizer.param_groups[0]["fused"] is False


def test_adafactor_takes_the_given_rate():
    group = Run("adafactor", learning_rate=3e-4).optimizer.param_groups[0]
    assert (group["lr"], group["relative_step"], group["scale_parameter"]) == (3e-4, False, False)
    usual = ("relative_step=False", "scale_parameter=True", "warmup_init=False")
    assert Run("adafactor", optimizer_args=usual).optimizer.param_groups[0]["scale_parameter"] is True
    with pytest.raises(ValueError, match="relative_step and warmup_init of adafactor replace the learning rate"):
        find_optimizer(OptimizerConfig(optimizer_type="adafactor", optimizer_args=("relative_step=True",)))


def test_groups_keep_their_own_rates():
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))]
    groups = [{"params": parameters[:1], "lr": 1e-3}, {"params": parameters[1:], "lr": 1.6e-2, "weight_decay": 0.5}]
    optimizer = make_optimizer(groups, OptimizerConfig(learning_rate=1e-3))
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 1.6e-2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.5]
    assert "initial_lr" not in groups[0]


def test_prodigy_starts_at_one_and_refuses_different_rates():
    needs("prodigyopt")
    assert OptimizerConfig(optimizer_type="Prodigy").rate == 1.0
    assert OptimizerConfig(optimizer_type="Prodigy", learning_rate=0.5).rate == 0.5
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))]
    groups = [{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 16.0}]
    with pytest.raises(ValueError, match="leave out loraplus_lr_ratio"):
        make_optimizer(groups, OptimizerConfig(optimizer_type="prodigy"))


def test_the_rate_that_acts_is_told():
    assert effective_rate(Run("adamw", learning_rate=3e-4).optimizer) == 3e-4
    needs("prodigyopt")
    run = Run("prodigy", optimizer_args=("d0=1e-5",))
    assert effective_rate(run.optimizer) == pytest.approx(1e-5)
    run.train(0, 20)
    group = run.optimizer.param_groups[0]
    assert group["d"] > 1e-5 and effective_rate(run.optimizer) == pytest.approx(group["lr"] * group["d"])


@pytest.mark.parametrize(
    ("name", "package"),
    [("prodigy", "prodigyopt"), ("schedulefree", "schedulefree"), ("AdamW8bit", "bitsandbytes")],
)
def test_a_missing_package_is_named_with_its_command(name, package, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)

    class Hidden:
        @staticmethod
        def find_spec(fullname, path=None, target=None):
            if fullname == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Hidden, *sys.meta_path])
    with pytest.raises(ValueError, match=f"'{name}' needs the package {package}; run: pip install {package}"):
        find_optimizer(OptimizerConfig(optimizer_type=name))


def test_a_broken_package_is_no_missing_one(monkeypatch):
    def fail(name):
        raise ImportError("libcudart.so.13 is missing")

    monkeypatch.setattr(optimizers.importlib, "import_module", fail)
    with pytest.raises(ValueError, match=r"bitsandbytes\.optim cannot be imported: libcudart"):
        find_optimizer(OptimizerConfig(optimizer_type="adamw8bit"))


def test_bitsandbytes_that_cannot_step_is_found_before_training(monkeypatch):
    needs("bitsandbytes")
    kind, _ = find_optimizer(OptimizerConfig(optimizer_type="adamw8bit"))
    monkeypatch.setattr(kind, "step", lambda self: (_ for _ in ()).throw(RuntimeError("no kernel image")))
    with pytest.raises(ValueError, match="AdamW8bit cannot train a LoRA on cpu: no kernel image; use adamw"):
        Run("adamw8bit")
    with pytest.raises(ValueError, match="PagedAdamW8bit pages between GPU and host memory; use adamw on the CPU"):
        Run("PagedAdamW8bit")


def test_an_optimiser_for_other_gradients_is_found_before_training():
    with pytest.raises(ValueError, match=r"SparseAdam cannot train a LoRA on cpu: .*dense gradients.*; use adamw"):
        Run("SparseAdam")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"optimizer_type": "adamm"}, r"'adamm' is no optimiser of torch\.optim; use one of adamw, adamw8bit"),
        ({"optimizer_type": "optimizer"}, r"'optimizer' is no optimiser of torch\.optim"),
        ({"optimizer_type": "lr_scheduler"}, "is no optimiser"),
        ({"optimizer_type": "LBFGS"}, "computes the loss several times a step"),
        ({"optimizer_args": ("weight_decy=0.1",)}, "weight_decy.*its optimizer_args are betas, eps, weight_decay"),
        ({"optimizer_type": "os.system"}, r"names a class of os, which is not allowed here"),
    ],
)
def test_what_is_no_optimiser_is_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        find_optimizer(OptimizerConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"optimizer_args": ("weight_decay",)}, "write name=value"),
        ({"optimizer_args": ("weight_decay=__import__('os')",)}, "must be a Python literal"),
        ({"optimizer_args": ("a=" + "(" * 5000,)}, "must be a Python literal"),
        ({"optimizer_args": ("lr=0.1",)}, "give learning_rate instead"),
        ({"optimizer_type": " "}, "optimizer_type is empty"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0; it must be 0"),
    ],
)
def test_settings_of_optimisers_are_checked_at_once(settings, text):
    with pytest.raises(ValueError, match=text):
        OptimizerConfig(**settings)


def test_values_that_an_optimiser_refuses_are_the_users_error():
    with pytest.raises(ValueError, match=r"AdamW refuses its settings, .*betas.*: Invalid beta"):
        Run("adamw", optimizer_args=("betas=(2.0, 0.9)",))


class TestDottedNames:
    @staticmethod
    def find(name: str, allow_dotted: bool = True):
        return find_optimizer(OptimizerConfig(optimizer_type=name), allow_dotted=allow_dotted)[0]

    def test_an_installed_class_is_found_where_that_is_allowed(self):
        name = "transformers.trainer_pt_utils.LayerWiseDummyOptimizer"
        assert self.find("torch.optim.AdamW") is torch.optim.AdamW
        with pytest.raises(ValueError, match="not allowed here"):
            self.find(name, allow_dotted=False)

    @pytest.mark.parametrize(
        "name",
        ["torch.nn.Linear", "torch.optim.lr_scheduler.LambdaLR", "torch.hub.load", "subprocess.run", "torch.x.Adam"],
    )
    def test_anything_but_an_optimiser_is_refused_and_not_called(self, name):
        with pytest.raises(
            ValueError, match=f"{name}'(:? is no optimiser|:? needs the package|: .* cannot be imported)"
        ):
            self.find(name)

    @pytest.mark.parametrize("name", ["torch.__main__.Adam", "_pytest.config.Adam", "torch..Adam"])
    def test_private_modules_are_not_imported(self, name):
        with pytest.raises(ValueError, match="is no dotted name of a public class"):
            self.find(name)

    def test_a_file_in_the_working_directory_is_not_run_and_importing_us_loads_nothing(self, tmp_path):
        touched = tmp_path / "touched"
        for name in ("evil", "pytest"):  # the second has the name of a package that is installed
            (tmp_path / f"{name}.py").write_text(f"open({str(touched)!r}, 'w')")
        script = (
            "import sys; sys.path.insert(0, '')\n"
            "from flux2_kit.training.optimizers import OptimizerConfig, find_optimizer\n"
            "print([name for name in ('transformers', 'bitsandbytes', 'accelerate') if name in sys.modules])\n"
            "for name in ('evil.Adam', 'pytest.Adam'):\n"
            "    try: find_optimizer(OptimizerConfig(optimizer_type=name), allow_dotted=True)\n"
            "    except ValueError as error: print(error)\n"
        )
        result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
        lines = result.stdout.splitlines()
        assert result.returncode == 0 and not touched.exists(), result.stderr
        assert lines[0] == "[]"
        assert "needs the package evil" in lines[1] and "which is not what pip installed" in lines[2]


def test_schedule_free_weights_are_averaged_for_a_look_and_come_back_bit_for_bit():
    needs("schedulefree")
    looked, plain = Run("schedulefree", learning_rate=0.01), Run("schedulefree", learning_rate=0.01)
    for step in range(10):
        looked.train(step, step + 1)
        before = deepcopy(looked.weights())
        with evaluation_weights(looked.optimizer):
            if step > 1:
                assert not torch.equal(looked.down, before[0])
            averaged = looked.down.detach().clone()
        assert torch.equal(looked.down, before[0]) and looked.optimizer.param_groups[0]["train_mode"]
    plain.train(0, 10)
    assert torch.equal(looked.up, plain.up) and torch.equal(looked.down, plain.down)
    set_training(plain.optimizer, False)
    assert torch.equal(plain.down, averaged)


def test_other_optimisers_have_nothing_to_switch():
    run = Run("adamw")
    before = run.down.detach().clone()
    set_training(run.optimizer, False)
    with evaluation_weights(run.optimizer):
        assert torch.equal(run.down, before)


def test_optimisers_wrapped_by_accelerate_are_switched_too():
    needs("schedulefree")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    try:
        wrapped = Accelerator(cpu=True).prepare_optimizer(Run("schedulefree").optimizer)
        set_training(wrapped, False)
        assert not wrapped.optimizer.param_groups[0]["train_mode"]
        with evaluation_weights(wrapped):
            pass
        assert wrapped.optimizer.param_groups[0]["train_mode"]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_schedule_free_optimisers_refuse_a_falling_rate():
    optimizer = OptimizerConfig(optimizer_type="AdamWScheduleFree")
    check_schedule(optimizer, ScheduleConfig(lr_scheduler="constant_with_warmup", lr_warmup_steps=5))
    check_schedule(OptimizerConfig(), ScheduleConfig(lr_scheduler="cosine"))
    with pytest.raises(ValueError, match="use constant or constant_with_warmup"):
        check_schedule(optimizer, ScheduleConfig(lr_scheduler="cosine"))


SCHEDULES = {
    "constant": [({}, {})],
    "constant_with_warmup": [({"lr_warmup_steps": 7}, {}), ({}, {})],
    "linear": [({"lr_warmup_steps": "10%"}, {}), ({}, {})],
    "cosine": [({"lr_warmup_steps": 0.1}, {}), ({}, {})],
    "cosine_with_restarts": [({"lr_warmup_steps": 3, "lr_scheduler_num_cycles": 4}, {"num_cycles": 4}), ({}, {})],
    "polynomial": [
        ({"lr_scheduler_power": 2.5, "lr_warmup_steps": 4}, {"power": 2.5, "lr_end": 0.0}),
        ({"lr_scheduler_min_lr_ratio": 0.2}, {"lr_end": 0.2 * 1e-3}),
    ],
    "cosine_with_min_lr": [
        ({"lr_scheduler_min_lr_ratio": 0.1, "lr_warmup_steps": 5}, {"min_lr_rate": 0.1}),
        ({"lr_scheduler_min_lr_ratio": 0.3, "lr_scheduler_num_cycles": 3}, {"min_lr_rate": 0.3, "num_cycles": 1.5}),
    ],
    "warmup_stable_decay": [
        ({"lr_warmup_steps": 6, "lr_decay_steps": "30%"}, {"num_decay_steps": 18}),
        (
            {"lr_warmup_steps": 6, "lr_decay_steps": 20, "lr_scheduler_min_lr_ratio": 0.25},
            {"num_decay_steps": 20, "min_lr_ratio": 0.25},
        ),
        ({"lr_decay_steps": 20, "lr_scheduler_num_cycles": 3}, {"num_decay_steps": 20, "num_cycles": 1.5}),
    ],
    "inverse_sqrt": [({"lr_warmup_steps": 6}, {}), ({}, {}), ({"lr_scheduler_timescale": 9}, {"timescale": 9})],
}


@pytest.mark.parametrize(
    ("name", "ours", "theirs"), [(name, *pair) for name, pairs in SCHEDULES.items() for pair in pairs]
)
def test_a_schedule_is_that_of_transformers_over_the_whole_run(name, ours, theirs):
    from transformers.optimization import get_inverse_sqrt_schedule, get_scheduler

    num_steps, config = 60, ScheduleConfig(lr_scheduler=name, **ours)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    warmup = {"10%": 6, 0.1: 6}.get(ours.get("lr_warmup_steps", 0), ours.get("lr_warmup_steps", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, since the optimiser makes no step
        if name == "inverse_sqrt":  # get_scheduler of transformers 4.56 drops the timescale
            scheduler = get_inverse_sqrt_schedule(optimizer, warmup, **theirs)
        else:
            scheduler = get_scheduler(name, optimizer, warmup, num_steps, theirs)
        for step in range(num_steps + 1):
            factor = learning_rate_factor(step, num_steps, config)
            assert factor == pytest.approx(optimizer.param_groups[0]["lr"] / 1e-3, abs=1e-12), step
            scheduler.step()


def test_rex_falls_along_its_formula():
    config = ScheduleConfig(lr_scheduler="rex", lr_warmup_steps=10, lr_scheduler_min_lr_ratio=0.0)
    found = [learning_rate_factor(step, 110, config) for step in (0, 5, 10, 35, 60, 85, 110)]
    # z / (0.1 + 0.9 z) at z = 1, 3/4, 1/2, 1/4, 0
    assert found == pytest.approx([0, 0.5, 1, 0.75 / 0.775, 0.5 / 0.55, 0.25 / 0.325, 0], abs=1e-12)
    assert learning_rate_factor(100, 100, ScheduleConfig(lr_scheduler="rex")) == pytest.approx(0.01)


def test_one_cycle_rises_over_the_warm_up_and_falls_to_zero():
    found = [optimizers.one_cycle(step, 100, 10) for step in (0, 50, 100)]
    assert found == pytest.approx([0.1, 0.5, 0.0], abs=1e-12)


@pytest.mark.parametrize("given", [16, "16", "10%", 0.1, "0.1"])
def test_a_warm_up_is_given_in_steps_or_as_a_share(given):
    config = ScheduleConfig(lr_scheduler="constant_with_warmup", lr_warmup_steps=given)
    assert [learning_rate_factor(step, 160, config) for step in (0, 4, 15, 16)] == [0, 0.25, 15 / 16, 1]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lr_scheduler": "piecewise_constant"}, "use warmup_stable_decay or cosine_with_restarts"),
        ({"lr_scheduler": "adafactor"}, "use lr_scheduler constant; optimizer_type adafactor takes"),
        ({"lr_scheduler": "cosin"}, "'cosin' is not available; use one of constant, constant_with_warmup"),
        ({"lr_warmup_steps": 10}, "lr_warmup_steps is 10, which has no effect .*; use constant_with_warmup"),
        ({"lr_scheduler": "cosine", "lr_decay_steps": 5}, "lr_decay_steps is 5, which has no effect"),
        ({"lr_scheduler": "cosine", "lr_scheduler_num_cycles": 3}, "lr_scheduler_num_cycles is 3, which has no"),
        ({"lr_scheduler": "linear", "lr_scheduler_power": 2.0}, "lr_scheduler_power is 2.0, which has no effect"),
        ({"lr_scheduler": "cosine", "lr_scheduler_min_lr_ratio": 0.1}, "lr_scheduler_min_lr_ratio is 0.1, which"),
        ({"lr_scheduler": "rex", "lr_scheduler_timescale": 5}, "lr_scheduler_timescale is 5, which has no effect"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "needs lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "rex", "lr_scheduler_min_lr_ratio": 1.0}, "is 1.0; it must lie in 0..1"),
        ({"lr_scheduler": "warmup_stable_decay"}, "needs lr_decay_steps"),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 1.5}, "lr_warmup_steps is 1.5; give a number of steps"),
        ({"lr_scheduler": "linear", "lr_warmup_steps": "120%"}, "lr_warmup_steps is '120%'; give"),
        ({"lr_scheduler": "linear", "lr_warmup_steps": -1}, "lr_warmup_steps is -1; give"),
        ({"lr_scheduler": "linear", "lr_warmup_steps": "few"}, "lr_warmup_steps is 'few'; give"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_power": 0.0}, "lr_scheduler_power is 0.0; it must be above 0"),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 0}, "must be 1 or more"),
    ],
)
def test_schedules_that_cannot_be_done_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        ScheduleConfig(**settings)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warm-up of 200 and a decay of 0 steps do not fit into 100 steps"):
        learning_rate_factor(0, 100, ScheduleConfig(lr_scheduler="linear", lr_warmup_steps=200))


class TestEma:
    @staticmethod
    def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (5,))]

    @staticmethod
    def move(parameters: list[Tensor], step: int) -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))

    def test_it_is_the_weighted_sum_of_all_weights_so_far(self):
        parameters = self.parameters()
        ema = Ema(parameters, 0.5)
        expected = parameters[0].detach().double()
        for step in range(1, 20):
            self.move(parameters, step)
            ema.update(parameters)
            decay = min(0.5, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * parameters[0].detach().double()
        torch.testing.assert_close(ema.averages[0].double(), expected, rtol=1e-5, atol=1e-6)

    def test_swapping_puts_the_average_in_and_the_weights_back(self):
        parameters = self.parameters()
        ema = Ema(parameters, 0.9)
        self.move(parameters, 1)
        ema.update(parameters)
        before = parameters[1].detach().clone()
        with pytest.raises(RuntimeError, match="stop"), ema.swapped_in(parameters):
            assert torch.equal(parameters[1], ema.averages[1]) and not torch.equal(parameters[1], before)
            raise RuntimeError("stop")
        assert torch.equal(parameters[1], before)

    def test_the_average_is_in_fp32_whatever_the_parameters_are(self):
        parameters = self.parameters(torch.bfloat16)
        ema = Ema(parameters, 0.999)
        ema.update(parameters)
        assert {value.dtype for value in ema.averages} == {torch.float32}

    def test_it_holds_no_memory_of_the_parameters(self):
        parameters = self.parameters()
        ema = Ema(parameters, 0.9)
        before = [average.clone() for average in ema.averages]
        self.move(parameters, 1)
        assert all(torch.equal(average, old) for average, old in zip(ema.averages, before, strict=True))

    def test_it_resumes_bit_for_bit(self):
        parameters = self.parameters()
        whole = Ema(parameters, 0.99)
        for step in range(5):
            self.move(parameters, step)
            whole.update(parameters)
        resumed = Ema(parameters, 0.99)
        resumed.load_state_dict(deepcopy(whole.state_dict()))
        self.move(parameters, 5)
        for ema in (whole, resumed):
            ema.update(parameters)
        assert torch.equal(whole.averages[0], resumed.averages[0])
        assert whole.num_updates == resumed.num_updates == 6

    def test_a_state_of_other_parameters_is_refused(self):
        for others in ([torch.zeros(3)], [torch.zeros(3, 4), torch.zeros(6)]):
            with pytest.raises(ValueError, match="belongs to other parameters"):
                Ema(self.parameters(), 0.9).load_state_dict(Ema(others, 0.9).state_dict())
        with pytest.raises(ValueError, match=r"the decay of the moving average is 1\.0"):
            Ema(self.parameters(), 1.0)

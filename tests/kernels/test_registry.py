"""Selection: what falls back, what must not, what a report says, and what recorded measurements change."""

import json
import pickle

import pytest
import torch

from nanochat_kernels import OPS, KernelPlan, KernelUnavailable, native, recorded
from nanochat_kernels.registry import MODES, REFERENCE, Case, Choice, Cost, Op, Place

CPU = torch.device("cpu")


def make_op(**backends):
    def double(x):
        return 2 * x

    def cases():
        yield Case("ones", lambda device, dtype, generator: ((torch.ones(3, device=device, dtype=dtype),), {}))

    return Op("double", torch=double, cases=cases, cost=lambda args, kwargs: Cost(24, 3), **backends)


@pytest.fixture
def with_double(monkeypatch):
    """Registers an op `double` with a right backend, a wrong one and one that cannot be imported."""

    def register(**options):
        op = make_op(right=lambda x: x + x, wrong=lambda x: x, missing="nanochat_kernels.no_such:f", **options)
        monkeypatch.setitem(OPS, "double", op)

    return register


def test_every_op_of_the_pipeline_is_declared():
    assert list(OPS) == [
        "rms_norm", "rope_qk_norm", "attention", "cached_attention", "paged_attention", "relu2_mlp",
        "linear_softcap_cross_entropy", "softcapped_logits", "orthogonalize", "muon_update", "adamw_update",
        "fp8_quantize", "fp8_rms_norm", "fp8_linear", "fp8_norm_qkv", "fp8_norm_mlp", "smeared_embedding", "paged_qkv",
        "thin_linear", "sample",
    ]  # fmt: skip


def test_the_reference_plan_runs_references():
    plan = KernelPlan.reference()
    assert {choice.backend for choice in plan.choices.values()} == {REFERENCE}
    assert plan.rms_norm is OPS["rms_norm"].reference
    assert plan["sample"] is OPS["sample"].reference


@pytest.mark.parametrize("mode", MODES)
def test_auto_prefers_banded_attention_and_a_loss_in_panels_on_a_cpu(mode, monkeypatch, tmp_path):
    monkeypatch.setattr(recorded, "RESULTS", tmp_path)  # what it does where nothing has been measured
    choices = KernelPlan.resolve("auto", CPU, torch.float32, mode).choices
    assert choices["attention"].backend == "sdpa" and "window" in choices["attention"].reason
    assert choices["linear_softcap_cross_entropy"].backend == ("chunked" if native.missing() else "native")
    assert all(choice.reason for choice in choices.values())


def test_a_plan_is_immutable_hashable_and_picklable():
    plan = KernelPlan.resolve("torch,attention=sdpa")
    with pytest.raises(AttributeError, match="immutable"):
        plan.rms_norm = None
    with pytest.raises(TypeError):
        plan.choices["rms_norm"] = Choice("x", False, "")
    copy = pickle.loads(pickle.dumps(plan))
    assert copy == plan and hash(copy) == hash(plan) and copy.attention is plan.attention
    assert plan != KernelPlan.reference()
    with pytest.raises(AttributeError, match="no op 'nonsense'"):
        plan.nonsense  # noqa: B018


def test_exceptions_to_a_policy_in_any_order():
    for text in ("torch,attention=sdpa", "attention=sdpa,torch", " attention=sdpa , torch "):
        choices = KernelPlan.resolve(text).choices
        assert choices["attention"].backend == "sdpa" and choices["softcapped_logits"].backend == REFERENCE


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("nonsense=torch", ("nonsense", "rms_norm")),
        ("rms_norm=nonsense", ("rms_norm", "nonsense", "torch")),
        ("nonsense", ("nonsense", "auto")),
    ],
)
def test_unknown_names_are_errors_that_list_the_known(text, names):
    with pytest.raises(KernelUnavailable) as caught:
        KernelPlan.resolve(text)
    assert all(name in str(caught.value) for name in names)


def test_unknown_mode():
    with pytest.raises(ValueError, match="training.*train-compiled"):
        KernelPlan.resolve("auto", mode="training")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where the backend cannot run")
def test_a_backend_asked_for_by_name_must_run():
    with pytest.raises(KernelUnavailable, match="attention=flex: needs an NVIDIA GPU"):
        KernelPlan.resolve("attention=flex")


@pytest.mark.parametrize(("backend", "reason"), [("wrong", "disagrees with the reference"), ("missing", "no_such")])
def test_a_backend_that_disagrees_or_fails_is_refused_with_the_reason(with_double, backend, reason):
    with_double(auto=((backend, lambda place: True, "fast"),), custom=(backend,))
    with pytest.raises(KernelUnavailable, match=reason):
        KernelPlan.resolve(f"double={backend}")
    for policy in ("auto", "fused"):
        choice = KernelPlan.resolve(policy).choices["double"]
        assert choice.backend == REFERENCE and reason in choice.reason


def test_fused_takes_what_verifies(with_double):
    with_double(custom=("wrong", "right"))
    assert KernelPlan.resolve("fused").choices["double"].backend == "right"


def write_rows(folder, times, device_class=None, **changes):
    folder = folder / (device_class or recorded.device_class(CPU))
    folder.mkdir(parents=True, exist_ok=True)
    row = {"op": "double", "case": "ones", "dtype": "float32", "mode": "train-eager"} | changes
    lines = [json.dumps(row | {"backend": backend, "median": time}) for backend, time in times.items()]
    (folder / "kernels.jsonl").write_text("\n".join(["not a row", '{"work": "train"}', *lines]) + "\n")


def test_recorded_rows_make_a_choice_proven(with_double, tmp_path):
    with_double()
    write_rows(tmp_path, {"torch": 3.0, "right": 1.5})
    plan = KernelPlan.resolve("auto", CPU, torch.float32, "train-eager", results=tmp_path)
    assert plan.choices["double"].backend == "right" and plan.choices["double"].proven
    assert "2.00×" in plan.choices["double"].reason
    line = next(line for line in plan.report().splitlines() if line.startswith("double"))
    assert line.split()[1:3] == ["right", "proven"]


@pytest.mark.parametrize("changes", [{"mode": "decode"}, {"dtype": "bfloat16"}, {"device_class": "elsewhere"}])
def test_rows_of_another_place_prove_nothing(with_double, tmp_path, changes):
    with_double()
    write_rows(tmp_path, {"torch": 3.0, "right": 1.5}, **changes)
    choice = KernelPlan.resolve("auto", results=tmp_path).choices["double"]
    assert choice.backend == REFERENCE and not choice.proven


def test_a_fast_backend_that_is_wrong_is_passed_over(with_double, tmp_path):
    with_double()
    write_rows(tmp_path, {"torch": 3.0, "wrong": 1.0, "gone": 0.5, "right": 2.0})
    assert KernelPlan.resolve("auto", results=tmp_path).choices["double"].backend == "right"


def test_the_reference_can_be_the_proven_choice(with_double, tmp_path):
    with_double(auto=(("right", lambda place: True, "hoped to be fast"),))
    write_rows(tmp_path, {"torch": 1.0, "right": 1.5})
    choice = KernelPlan.resolve("auto", results=tmp_path).choices["double"]
    assert choice.backend == REFERENCE and choice.proven


def test_probes_see_the_place(with_double):
    seen = []
    with_double(available={"right": lambda place: seen.append(place) or "not today"})
    with pytest.raises(KernelUnavailable, match="not today"):
        KernelPlan.resolve("double=right", "cpu", torch.bfloat16, "decode")
    assert seen == [Place(CPU, torch.bfloat16, "decode")]


def test_declarations_that_contradict_themselves():
    with pytest.raises(ValueError, match="nonsense named but not declared"):
        make_op(custom=("nonsense",))


def test_reports_name_every_op_with_a_reason():
    report = KernelPlan.resolve("auto").report()
    for name, choice in KernelPlan.resolve("auto").choices.items():
        assert name in report and choice.reason in report

"""Generic tests, made from the declarations: every backend, case, result and gradient; costs; the verifier."""

import json

import pytest
import torch

from nanochat_kernels import OPS, verify
from nanochat_kernels.registry import Case, Cost, Op, Place

CPU = torch.device("cpu")
COMBINATIONS = [
    pytest.param(op, backend, case, dtype, id=f"{op.name}-{backend}-{case.name}-{str(dtype)[6:]}")
    for op in OPS.values()
    for backend in op.backends
    for case in op.cases()
    if case.size != "model"
    for dtype in case.dtypes
]


@pytest.mark.parametrize(("op", "backend", "case", "dtype"), COMBINATIONS)
def test_backend_agrees_with_the_reference(op, backend, case, dtype):
    probe = op.available.get(backend)
    if probe and (reason := probe(Place(CPU, dtype, "train-eager"))):
        pytest.skip(reason)
    row = verify.check(op, backend, case, CPU, dtype)
    assert row.ok, row.summary()


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_declarations_are_complete(op):
    sizes = {case.size for case in op.cases()}
    assert {"small", "model"} <= sizes <= {"small", "odd", "model"}
    assert set(op.differentiable) <= set(op.parameters()) and set(op.mutates) <= set(op.parameters())
    assert len({case.name for case in op.cases()}) == len(list(op.cases()))


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_costs_are_positive_and_grow_with_the_case(op):
    costs = {}
    for case in op.cases():
        if case.size == "small":
            args, kwargs = case.make(CPU, case.dtypes[0], torch.Generator().manual_seed(0))
            costs[case.name] = op.cost(args, kwargs)
    assert all(cost.bytes > 0 and cost.flops > 0 for cost in costs.values())


def test_cost_of_known_calls():
    x = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert OPS["rms_norm"].cost((x,), {}).bytes == 2 * 32 * 2
    q = torch.zeros(1, 10, 2, 4)
    assert OPS["attention"].cost((q, q, q, 10), {}).flops == 4 * 2 * 4 * 55  # 55 = 10·11/2 visible pairs
    assert OPS["attention"].cost((q, q, q, 1), {}).flops == 4 * 2 * 4 * 19
    p = [torch.zeros(100)]
    assert OPS["adamw_update"].cost((p, p, p, p), {}).bytes == 7 * 400
    head = OPS["linear_softcap_cross_entropy"].cost((torch.zeros(6, 5), torch.zeros(7, 5), torch.zeros(6)), {})
    assert head.flops == 6 * 6 * 5 * 7


COMPILED = ("rms_norm", "rope_qk_norm", "attention", "relu2_mlp", "linear_softcap_cross_entropy")


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "torch") for name in COMPILED]
    + [
        ("attention", "sdpa"),
        ("linear_softcap_cross_entropy", "chunked"),
        ("orthogonalize", "blas"),
        ("sample", "torch"),
    ],
)
def test_traces_without_graph_breaks(name, backend):
    op = OPS[name]
    case = next(iter(op.cases()))
    args, kwargs = case.make(CPU, torch.float32, torch.Generator().manual_seed(0))
    args = [x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    compiled = torch.compile(op.load(backend), backend="aot_eager", fullgraph=True)
    expected, result = op.load(backend)(*args, **kwargs), compiled(*args, **kwargs)
    torch.testing.assert_close(result, expected)
    if op.differentiable:
        first = result[0] if isinstance(result, tuple) else result
        first.sum().backward()
        assert torch.isfinite(args[0].grad).all()


# The verifier itself: it must see what it is there to see.


def faulty(function, **options):
    def cases():
        yield Case("values", lambda device, dtype, generator: ((torch.arange(1.0, 1001.0, dtype=dtype),), {}))

    return Op(
        "square",
        torch=lambda x: x.square(),
        cases=cases,
        cost=lambda args, kwargs: Cost(1, 1),
        differentiable=("x",),
        other=function,
        **options,
    )


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x


def one_wrong_element(x):
    y = x.square()
    mask = torch.arange(x.numel()) == 3
    return y + mask * 100.0


@pytest.mark.parametrize(
    ("function", "symptom"),
    [
        (one_wrong_element, "result"),
        (WrongGradient.apply, "gradient of x"),
        (lambda x: x.square() + torch.empty(1000) * 0, "result"),
        (lambda x: x.square()[:-1], "result"),
        (lambda x: x.no_such_thing, "raised AttributeError"),
    ],
    ids=["one element", "gradient", "unwritten memory", "shape", "raises"],
)
def test_the_verifier_sees(function, symptom):
    op = faulty(function)
    row = verify.check(op, "other", next(iter(op.cases())), CPU, torch.float32)
    assert not row.ok and symptom in row.quantity


def test_gaps_between_strided_inputs_are_poisoned():
    x = torch.zeros(4, 6)[:, :3]
    copy = verify._copied(x, None)
    assert copy.stride() == x.stride() and torch.equal(copy, x)
    assert torch.isnan(copy.as_strided((3, 6), (6, 1))[:, 3:]).all()


def test_poisoning_ends_with_its_block():
    with verify.nan_poisoned_memory():
        assert torch.isnan(torch.empty(100)).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_rows_are_written_and_the_exit_code_tells(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    config = verify.VerifyConfig(ops=("softcapped_logits",), device="cpu", json=path)
    assert verify.main(config) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["backend"] for row in rows} == {"torch", "inplace"} and {row["verdict"] for row in rows} == {"pass"}
    monkeypatch.setitem(OPS, "square", faulty(one_wrong_element))
    assert verify.main(verify.VerifyConfig(ops=("square",), device="cpu")) == 1
    assert "fail" in capsys.readouterr().out

"""Products of whole numbers: the formula to the bit, on every kind of processor, in any company."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from puna.kernels import integers
from puna.kernels.compiler import build, default_compiler
from puna.kernels.library import NAMES, load
from puna.kernels.products import described, entry

pytestmark = pytest.mark.skipif(load("integers").functions is None, reason=load("integers").fault)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["int8", "int4"]
SHAPES = [(32, 32, 32), (1, 8, 8), (31, 40, 40), (33, 96, 8), (96, 288, 32), (172, 96, 24), (70, 1280, 128)]
"""(O, I, G)"""
ROWS = [0, 1, 2, 3, 5, 6, 7, 12, 13, 16, 19, 24, 29, 113, 230]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Stored:
    """What weights carry."""

    scheme: str
    data: Tensor
    scales: Tensor
    shape: tuple[int, ...]


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=random(seed))


def stored(kind: str, outputs: int, inputs: int, group: int, scales: torch.dtype = torch.float16) -> Stored:
    """Any numbers, −128 among them, and scales of either sign."""
    if kind == "int8":
        data = torch.randint(-128, 128, (outputs, inputs), generator=random(1), dtype=torch.int8)
    else:
        data = torch.randint(0, 256, (outputs, inputs // 2), generator=random(1), dtype=torch.uint8)
    factors = (normal(outputs, inputs // group, seed=2) * 0.02).to(scales)
    return Stored(kind, data, factors, (outputs, inputs))


def numbers_of(matrix: Stored) -> Tensor:
    """(O, I) float64, as the definition has them."""
    if matrix.scheme == "int8":
        return matrix.data.double()
    numbers = torch.empty(matrix.shape, dtype=torch.float64)
    numbers[:, 0::2], numbers[:, 1::2] = matrix.data.long() % 16 - 8, matrix.data.long() // 16 - 8
    return numbers


def values_of(matrix: Stored) -> Tensor:
    """(O, I) float32."""
    group = matrix.shape[1] // matrix.scales.shape[1]
    return numbers_of(matrix).float() * matrix.scales.float().repeat_interleave(group, 1)


def rounded(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Whole numbers (R, groups, G) float64 and scales (R, groups) float32 of rows (R, I)."""
    parts = x.float().unflatten(-1, (groups, -1))
    scales = parts.abs().amax(-1) / 127
    q = torch.where(scales[..., None] > 0, parts / scales[..., None], 0)
    return q.round().clamp(-127, 127).double(), scales


def formula(x: Tensor, matrix: Stored, bias: Tensor | None = None) -> Tensor:
    """The definition: sums that float64 holds exactly, then float32, one rounding for each operation."""
    groups = matrix.scales.shape[1]
    weights = numbers_of(matrix).unflatten(1, (groups, -1))
    q, scales = rounded(x, groups)
    out = torch.zeros(len(x), len(weights))
    for group in range(groups):
        sums = q[:, group] @ weights[:, group].t()
        out = out + sums.float() * (scales[:, group, None] * matrix.scales[:, group].float())
    return (out if bias is None else out + bias.float()).to(x.dtype)


def product(x: Tensor, matrix: Stored, bias: Tensor | None = None) -> Tensor:
    packed = integers.into_panels((matrix.data, matrix.scales))
    return integers.multiply(x, *packed, bias, len(matrix.data))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs", "group"), SHAPES)
def test_the_matrix_comes_back_bit_for_bit(
    outputs: int, inputs: int, group: int, scales: torch.dtype, kind: str
) -> None:
    matrix = stored(kind, outputs, inputs, group, scales)
    panels, factors = integers.into_panels((matrix.data, matrix.scales))
    step = 4 if kind == "int8" else 8
    assert panels.shape == (-(-outputs // 32), inputs // step, 32, 4) and panels.dtype == matrix.data.dtype
    assert factors.shape == (-(-outputs // 32), inputs // group, 32) and factors.dtype == scales
    data, back = integers.out_of_panels(panels, factors, outputs)
    assert torch.equal(data, matrix.data) and torch.equal(back, matrix.scales)
    odd = torch.cat((matrix.data.flatten()[:1], matrix.data.flatten()))[1:].view_as(matrix.data)
    assert torch.equal(integers.into_panels((odd, matrix.scales))[0], panels)  # wherever it begins in memory
    turned = matrix.data.t().contiguous().t()
    assert torch.equal(integers.into_panels((turned, matrix.scales))[0], panels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", DTYPES, ids=str)
def test_words_that_are_no_floats_come_back_too(kind: str, scales: torch.dtype) -> None:
    """Words are moved as floats: those that would be signalling NaN must not be quietened."""
    signalling = torch.tensor([0x01, 0x00, 0x80, 0x7F], dtype=torch.uint8).repeat(64, 8)
    data = signalling if kind == "int4" else signalling.view(torch.int8)
    factors = normal(64, 1).to(scales)
    panels, packed = integers.into_panels((data, factors))
    assert torch.equal(integers.out_of_panels(panels, packed, 64)[0], data)
    found = integers.outputs_of(panels, packed, torch.arange(64), torch.float32)
    matrix = Stored(kind, data, factors, (64, 32 if kind == "int8" else 64))
    assert torch.equal(found, values_of(matrix))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heights", [(32, 64, 32), (32, 64, 5), (33, 7, 64)])
def test_several_matrices_are_one(heights: tuple[int, ...], kind: str) -> None:
    parts = [stored(kind, height, 64, 32, torch.bfloat16) for height in heights]
    panels, factors = integers.into_panels(*((part.data, part.scales) for part in parts))
    data, scales = torch.cat([part.data for part in parts]), torch.cat([part.scales for part in parts])
    assert all(map(torch.equal, (panels, factors), integers.into_panels((data, scales))))
    back = integers.out_of_panels(panels, factors, sum(heights))
    assert torch.equal(back[0], data) and torch.equal(back[1], scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_the_matrix_in_floating_point(kind: str, dtype: torch.dtype) -> None:
    matrix = stored(kind, 70, 96, 32)
    which = torch.tensor([[0, 69, 5], [31, 32, 33]])
    found = integers.outputs_of(*integers.into_panels((matrix.data, matrix.scales)), which, dtype)
    assert torch.equal(found, values_of(matrix)[which].to(dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", DTYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs", "group"), SHAPES)
def test_products_are_the_formula_to_the_bit(
    outputs: int, inputs: int, group: int, scales: torch.dtype, dtype: torch.dtype, kind: str
) -> None:
    matrix = stored(kind, outputs, inputs, group, scales)
    x, bias = normal(17, inputs, seed=3).to(dtype), normal(outputs, seed=4).to(dtype)
    for added in (None, bias):
        expected = formula(x, matrix, added)
        assert torch.equal(product(x, matrix, added), expected)
        panels = integers.into_panels((matrix.data, matrix.scales))
        assert torch.equal(integers.plain(x, *panels, added, outputs), expected)
    assert product(x.view(17, 1, inputs), matrix).shape == (17, 1, outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_near_those_without_rounding(kind: str) -> None:
    """An error of half a step for each input, which are 1/127 of the largest in their group."""
    matrix, x = stored(kind, 64, 512, 32), normal(9, 512, seed=3)
    values = values_of(matrix).double()
    steps = x.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1).double() / 127
    error = (product(x, matrix).double() - F.linear(x.double(), values)).abs()
    assert (error <= F.linear(steps / 2, values.abs()) * (1 + 1e-5)).all() and error.max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [8, 32, 1536])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(group: int, kind: str) -> None:
    matrix, x = stored(kind, 75, 1536, group), normal(max(ROWS), 1536, seed=3).to(torch.bfloat16)
    expected = formula(x, matrix)
    packed = integers.into_panels((matrix.data, matrix.scales))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in ROWS:
            first = max(ROWS) - rows
            assert torch.equal(integers.multiply(x[first:], *packed, None, 75), expected[first:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 2048])
def test_the_largest_whole_numbers(group: int, kind: str) -> None:
    """Signs that make every term as large as it can be, so that what saturates or overflows is seen."""
    signs = torch.ones(4, 2048)
    signs[1], signs[2, ::2], signs[3, ::4] = -1, -1, -1
    for low, high in ((-128, -128), (127, 127), (-128, 127), (127, -128)):
        data = torch.tensor([low, high], dtype=torch.int8).repeat(33, 1024)
        if kind == "int4":
            data = torch.full((33, 1024), (low & 15) | (high & 15) << 4, dtype=torch.uint8)
        matrix = Stored(kind, data, torch.ones(33, 2048 // group), (33, 2048))
        assert torch.equal(product(signs * 3, matrix), formula(signs * 3, matrix))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_numbers_at_the_ends_of_their_type(kind: str, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    tiny = limits.smallest_normal * limits.eps  # the smallest of all
    rows = torch.stack([torch.zeros(64), *(normal(64, seed=k).sign() for k in range(3)), normal(64)]).to(
        dtype
    )
    x = rows * torch.tensor([[1.0], [tiny], [tiny * 200], [limits.max], [limits.max / 8]]).to(dtype)
    x[0, 5] = -0.0
    for group in (8, 64):
        matrix = stored(kind, 40, 64, group)
        found, expected = product(x, matrix).float(), formula(x, matrix).float()
        # bfloat16's own instruction rounds to 0 what is below the normal numbers
        vanished = (expected.abs() < limits.smallest_normal) & (found == 0) & (dtype == torch.bfloat16)
        assert ((found == expected) | vanished | (found.isnan() & expected.isnan())).all()
        assert not found[0].any()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_harms_only_its_row(kind: str, dtype: torch.dtype, value: float) -> None:
    for group in (8, 64):
        matrix, x = stored(kind, 40, 64, group), normal(20, 64).to(dtype)
        packed = integers.into_panels((matrix.data, matrix.scales))
        sound = integers.multiply(x, *packed, None, 40)
        x[7, 33], x[18, 0] = value, value
        others = [row for row in range(20) if row not in (7, 18)]
        for multiply in (integers.multiply, integers.plain):
            found = multiply(x, *packed, None, 40)
            assert torch.equal(found[others], sound[others])
            assert not found[[7, 18]].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_results_may_lie_apart(kind: str) -> None:
    """As where several products fill the columns of one tensor."""
    matrix, x = stored(kind, 40, 64, 32), normal(9, 64).to(torch.bfloat16)
    panels, factors = integers.into_panels((matrix.data, matrix.scales))
    functions = load("integers").functions
    assert functions is not None
    call = entry(functions, f"multiply_{kind}_bfloat16")
    out = torch.full((9, 50), 7.0, dtype=torch.bfloat16)
    told = described(panels, factors, None, 64, 40, 32)
    call(ctypes.addressof(told), x.data_ptr(), out[:, 5:].data_ptr(), 9, 50, 2)
    assert torch.equal(out[:, 5:45], formula(x, matrix))
    assert (out[:, :5] == 7).all() and (out[:, 45:] == 7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_input_as_if_it_had_not_been_rounded(kind: str) -> None:
    matrix, x = stored(kind, 48, 64, 32), normal(7, 64, seed=3).requires_grad_()
    gradient = normal(7, 48, seed=5)
    product(x, matrix).backward(gradient)
    assert x.grad is not None and torch.allclose(x.grad, gradient @ values_of(matrix), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_type_without_compiled_code_are_multiplied_too(kind: str) -> None:
    matrix, x = stored(kind, 40, 64, 32), normal(3, 64).double()
    assert torch.equal(product(x, matrix), formula(x, matrix))


def test_what_suits() -> None:
    def suits(kind: str, inputs: int, group: int, scales: torch.dtype = torch.float16) -> bool:
        return integers.suits(stored(kind, 32, inputs, group, scales))

    assert suits("int8", 12, 4) and suits("int8", 36, 36) and suits("int4", 24, 8)
    assert suits("int8", 64, 32, torch.float32) and suits("int4", 64, 32, torch.bfloat16)
    assert not suits("int8", 12, 6) and not suits("int4", 24, 12)
    assert not suits("int8", 64, 32, torch.float64)
    matrix = stored("int8", 32, 64, 32)
    assert not integers.suits(Stored("nf4", matrix.data, matrix.scales, matrix.shape))
    assert not integers.suits(Stored("int8", matrix.data.to("meta"), matrix.scales, matrix.shape))


def test_a_group_is_no_longer_than_its_sum_can_be_held() -> None:
    """−128 · 127 for each input is the most."""
    longest = integers.LONGEST // 8 * 8
    assert longest * 128 * 127 < 2**31 <= (longest + 8) * 128 * 127
    data = torch.full((1, longest), -128, dtype=torch.int8)
    matrix = Stored("int8", data, torch.ones(1, 1), (1, longest))
    x = torch.ones(2, longest)
    x[1] = -1
    assert integers.suits(matrix)
    assert torch.equal(product(x, matrix), formula(x, matrix))
    over = Stored("int8", data.repeat(1, 2), torch.ones(1, 1), (1, 2 * longest))
    assert not integers.suits(over)
    assert integers.suits(Stored("int8", over.data, torch.ones(1, 2), over.shape))


PROCESSORS = {
    "x86-64": (),
    "sandybridge": ("avx",),
    "haswell": ("avx2", "fma", "f16c"),
    "alderlake": ("avx_vnni",),
    "skylake-avx512": ("avx512bw", "avx512vl", "avx512dq"),
}
"""Those of other kinds than this one, and what it must be able to do to run code for them."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="code for x86 processors runs on one")
@pytest.mark.parametrize(
    "processor",
    [name if name == "haswell" else pytest.param(name, marks=pytest.mark.slow) for name in PROCESSORS],
)
def test_other_processors_give_the_same_bits(processor: str, tmp_path: Path) -> None:
    information = Path("/proc/cpuinfo")
    able = information.read_text().split() if information.is_file() else []
    if not set(PROCESSORS[processor]) <= set(able):
        pytest.skip(f"this processor cannot run code for {processor}")
    source = Path(integers.__file__).with_suffix(".cpp")
    # -O1 takes a third of the time, and contracts and orders operations by the same rules.
    flags = ["-std=c++17", "-O1", f"-march={processor}", "-fno-math-errno", "-ffp-contract=fast"]
    assert not build(default_compiler(), source, tmp_path / "other.so", flags, seconds=300)
    functions = ctypes.CDLL(str(tmp_path / "other.so"))
    for kind in KINDS:
        for group, scales in ((8, torch.float16), (32, torch.bfloat16), (288, torch.float32)):
            matrix = stored(kind, 72, 288, group, scales)
            _same(functions, matrix, group)


def _same(functions: ctypes.CDLL, matrix: Stored, group: int) -> None:
    """A library's products are the formula's, extreme numbers included."""
    panels, factors = integers.into_panels((matrix.data, matrix.scales))
    for dtype in DTYPES:
        bias = normal(72, seed=4).to(dtype)
        told = described(panels, factors, bias, 288, 72, group)
        x = normal(13, 288, seed=3)
        x[4], x[5, ::2] = 1, -1
        x = x.to(dtype)
        for rows in (1, 13):
            out = torch.empty(rows, 72, dtype=dtype)
            call = entry(functions, f"multiply_{matrix.scheme}_{NAMES[dtype]}")
            call(ctypes.addressof(told), x.data_ptr(), out.data_ptr(), rows, 72, 1)
            assert torch.equal(out, formula(x[:rows], matrix, bias))

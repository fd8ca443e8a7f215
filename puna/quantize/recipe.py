"""A recipe: which tensors of a model are quantized, and how.

scheme = "int4"
group = 128

[exceptions]
"*.down_proj" = "int8"
"model.layers.0.*" = "keep"
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, model_validator
from torch import Tensor

from puna.errors import ModelError, SettingsError, nearest
from puna.model.config import ModelConfig
from puna.model.weights import Packed, shapes
from puna.quantize.schemes import SCHEMES, Format, allowed
from puna.settings import Settings

KEEP, AUTO = "keep", "auto"
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
GROUPS = (32, 128)
_GROUPED = {f"{name}:{group}": (name, group) for name in SCHEMES if name != "nf4" for group in GROUPS}
_NEVER = ("norm.weight", ".bias")


@dataclass(frozen=True)
class Choice:
    """How one tensor is quantized: the scheme by its name in SCHEMES, and the numbers that come of it."""

    scheme: str
    format: Format


def _known(value: str) -> str:
    """A choice as users write it: keep, a scheme, or a scheme and its group such as int8:32."""
    scheme, colon, _ = value.partition(":")
    if scheme not in SCHEMES and value != KEEP:
        raise ValueError(
            f"expected {KEEP} or a scheme ({', '.join(SCHEMES)}), got {value!r}."
            + nearest(scheme, [KEEP, *SCHEMES])
        )
    if colon and value not in _GROUPED:
        raise ValueError(
            f"expected int8, int4 or gptq in groups of 32 or 128, such as int8:32, got {value!r}"
        )
    return value


def _known_or_auto(value: str) -> str:
    return value if value == AUTO else _known(value)


def _joined(value: Any) -> Any:
    """Tables within tables as one, since a pattern's dots were taken for theirs; without TOML's quotes."""
    return {key.strip("'\""): how for key, how in _leaves(value)} if isinstance(value, dict) else value


def _leaves(table: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


How = Annotated[str, AfterValidator(_known)]
"""keep, a scheme, or a scheme and its group such as int8:32."""


HowOrAuto = Annotated[str, AfterValidator(_known_or_auto)]
"""The same, or auto: what `Recipe` says."""


class Recipe(Settings):
    """How a model is quantized. Norms and biases never are.

    `group` is that of the scheme, which may name it too (int8:32); `scales` the type of all scales; None is
    each scheme's own choice, and bfloat16 of a bfloat16 model (`settled`). The embedding (auto) is kept, the
    output projection (auto) int8 where the others are whole numbers, and kept in nf4. Where the two are one
    matrix, what is asked of one is done to both, and without that it is kept. `exceptions` names modules or
    tensors by pattern (`*`, `?`, `[…]`), each with what is done instead; the last that matches wins.
    """

    scheme: Literal["int8", "int4", "gptq", "nf4"] = "int8"
    group: Literal[32, 128] | None = None
    scales: Literal["float16", "bfloat16", "float32"] | None = None
    embeddings: HowOrAuto = AUTO
    output: HowOrAuto = AUTO
    exceptions: Annotated[dict[str, How], BeforeValidator(_joined)] = {}

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, values: Any) -> Any:
        """A scheme that names its group as two settings."""
        scheme = values.get("scheme") if isinstance(values, dict) else None
        if not isinstance(scheme, str) or scheme in SCHEMES:
            return values
        if scheme not in _GROUPED:
            raise ValueError(
                f"'scheme': expected {', '.join(SCHEMES)}, or one with a group ({', '.join(_GROUPED)}), "
                f"got {scheme!r}.{nearest(scheme, [*SCHEMES, *_GROUPED])}"
            )
        name, group = _GROUPED[scheme]
        if values.get("group") not in (None, group):
            raise ValueError(f"scheme={scheme} and group={values['group']} differ: leave one of them out")
        return {**values, "scheme": name, "group": group}

    def choice_of(self, name: str) -> Choice | None:
        """How a tensor of this name is quantized, or None where it is kept; shapes are not looked at.

        A tied output projection has no tensor of its own: ask `choices`.
        """
        if name.endswith(_NEVER):
            return None
        return self._choice(self._settled(name))

    def format_of(self, name: str, shape: tuple[int, ...]) -> Format | None:
        """The numbers that a tensor becomes, or None where it is kept.

        Raises:
            ModelError: its shape does not allow them.
        """
        choice = self.choice_of(name)
        if choice is None:
            return None
        allowed(name, shape, choice.format)
        return choice.format

    def asked(self, name: str) -> str:
        """What the recipe says of a matrix of this name, as users write it; auto where it says nothing."""
        matching = [how for pattern, how in self.exceptions.items() if matches(pattern, name)]
        if matching:
            return matching[-1]
        return {EMBEDDING: self.embeddings, OUTPUT: self.output}.get(name, self.scheme)

    def _settled(self, name: str) -> str:
        how = self.asked(name)
        if how != AUTO:
            return how
        return "int8" if name == OUTPUT and self.scheme != "nf4" else KEEP

    def _choice(self, how: str) -> Choice | None:
        if how == KEEP:
            return None
        scheme, _, group = how.partition(":")
        format = SCHEMES[scheme].format
        if format.scheme == SCHEMES[self.scheme].format.scheme and scheme != "nf4":
            format = replace(format, group=self.group or format.group)
        if group:
            format = replace(format, group=int(group))
        return Choice(scheme, replace(format, scales=self._scales(format)))

    def _scales(self, format: Format) -> torch.dtype:
        if self.scales is not None and format.scheme != "nf4":
            found: torch.dtype = getattr(torch, self.scales)
            return found
        # Of a whole row's scale the bits do not count; by groups it is what GGUF's Q8_0 has.
        return torch.float16 if format.scheme == "int8" and format.group else format.scales


def settled(recipe: Recipe, stored: torch.dtype) -> Recipe:
    """The recipe for a model that is stored in a type: scales left open are bfloat16 where the rest is.

    Whoever opens the directory elsewhere has one type for all; float16 beside bfloat16 would make it float32.
    """
    if recipe.scales is not None or recipe.scheme == "nf4" or stored != torch.bfloat16:
        return recipe
    return recipe.model_copy(update={"scales": "bfloat16"})


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a tensor, or the module that it belongs to."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[0], pattern)


def choices(recipe: Recipe, config: ModelConfig) -> dict[str, Choice]:
    """Every tensor of a model that is quantized, in the model's order, with how.

    Raises:
        ModelError: a shape does not allow what is asked for it.
        SettingsError: a pattern matches nothing, or what is asked for contradicts the model or itself.
    """
    known = shapes(config)
    _check(recipe, config, known)
    found = {}
    shared = config.tie_word_embeddings and recipe.asked(EMBEDDING) == AUTO != recipe.asked(OUTPUT)
    for name, shape in known.items():
        choice = recipe.choice_of(OUTPUT if shared and name == EMBEDDING else name)
        if choice is not None:
            allowed(name, shape, choice.format)
            found[name] = choice
    return found


def told(recipe: Recipe, config: ModelConfig) -> Iterator[str]:
    """What is done beyond what a recipe asks, a sentence each."""
    embedding, output = (recipe.asked(name) for name in (EMBEDDING, OUTPUT))
    if config.tie_word_embeddings and (embedding == AUTO) != (output == AUTO):
        one, other = "output projection", "embedding"
        if output == AUTO:
            one, other = other, one
        how = embedding if output == AUTO else output
        yield f"{how} is asked of the {one}, and so the {other} is: in this model they are one matrix"


def not_quantized(name: str, value: Tensor | Packed) -> Tensor:
    """The tensor itself.

    Raises:
        ModelError: it is quantized already.
    """
    if isinstance(value, Packed):
        raise ModelError(
            f"{name} is {value.scheme} already, and rounding it once more would lose twice; give the model "
            "in full precision that it was made from"
        )
    return value


def _check(recipe: Recipe, config: ModelConfig, known: dict[str, tuple[int, ...]]) -> None:
    _check_nf4(recipe)
    _check_ends(recipe, config)
    matrices = [*dict.fromkeys((*(name for name in known if not name.endswith(_NEVER)), OUTPUT))]
    for pattern in recipe.exceptions:
        if not any(matches(pattern, name) for name in matrices):
            raise SettingsError(
                f"exceptions: {pattern!r} matches no matrix of this model.{_near(pattern, matrices)}"
            )


def _check_nf4(recipe: Recipe) -> None:
    asked = {how.partition(":")[0] for how in (recipe.embeddings, recipe.output, *recipe.exceptions.values())}
    if recipe.scheme == "nf4" and (recipe.group or recipe.scales):
        raise SettingsError("nf4 has blocks of 64 with float32 scales: leave group and scales out")
    if recipe.embeddings == "nf4":
        raise SettingsError("embeddings cannot be nf4, which is of linear layers: set embeddings=keep")
    mixed = asked - {KEEP, AUTO, "nf4"} if recipe.scheme == "nf4" else asked & {"nf4"}
    if mixed:
        others = ", ".join(sorted({recipe.scheme, *mixed} - {"nf4"}))
        raise SettingsError(f"nf4 is for fine-tuning and goes with keep alone, got it beside {others}")


def _check_ends(recipe: Recipe, config: ModelConfig) -> None:
    """The embedding and the output projection, which may be one."""
    embedding, output = (recipe.asked(name) for name in (EMBEDDING, OUTPUT))
    tied = config.tie_word_embeddings
    if tied and AUTO not in (embedding, output) and embedding != output:
        raise SettingsError(
            f"the embedding is to be {embedding} and the output projection {output}, but in this model they "
            "are one matrix: ask one thing of both, or of one of them"
        )
    choice = recipe.choice_of(EMBEDDING)
    if choice is not None and choice.scheme == "gptq":
        raise SettingsError(
            "embeddings cannot be gptq, since they take no inputs: set embeddings=int4 or int8"
        )
    if tied and output.partition(":")[0] in ("gptq", "nf4"):
        raise SettingsError(
            f"output={output} is not for a matrix that is the embedding too: set output=int8, int4 or keep"
        )


def _near(pattern: str, names: list[str]) -> str:
    """The name nearest to a pattern; the last part of one where the pattern has stars before it."""
    modules = [name.removesuffix(".weight") for name in names]
    if any(module.endswith(f".{pattern}") for module in modules):
        return f" Did you mean '*.{pattern}'?"
    star = pattern.rpartition("*.")[0]
    leaves = {module.rpartition(".")[2]: module for module in modules}
    return nearest(pattern, [f"{star}*.{name}" for name in leaves] if "*." in pattern else modules)

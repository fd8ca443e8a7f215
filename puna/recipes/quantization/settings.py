"""What `puna quantize` may be told: a recipe, how much text, how errors are compensated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import puna.tokenizer
from puna.errors import SettingsError
from puna.quantize.gptq import GptqSettings
from puna.quantize.recipe import Recipe
from puna.recipes.quantization.calibration import CalibrationSettings
from puna.settings import Settings, overridden, parse, read_toml
from puna.tokenizer.tokenizer import Tokenizer


class QuantizeSettings(Settings):
    """Everything that decides the result, but the model and the text.

    Attributes:
        recipe: what is quantized, and how; on the command line and in TOML its fields stand at the top.
        calibration: how much text.
        gptq: how errors are compensated.
        measure: whether to run text through both models, and so know what was lost.
    """

    recipe: Recipe = Recipe()
    calibration: CalibrationSettings = CalibrationSettings()
    gptq: GptqSettings = parse(GptqSettings, {})
    measure: bool = True


def read_quantize_settings(
    file: Path | None, options: Mapping[str, Any], exceptions: Sequence[str], changes: Sequence[str]
) -> QuantizeSettings:
    """Settings from a TOML file, options, `PATTERN=SCHEME` and `key=value`, later ones winning.

    Raises:
        SettingsError: in one line, every fault found.
    """
    values = {**({} if file is None else read_toml(file)), **options}
    if exceptions:
        values["exceptions"] = {**values.get("exceptions", {}), **dict(map(_exception, exceptions))}
    return settings_of(overridden(values, changes), "settings" if file is None else str(file))


class Inputs(Settings):
    """The files that a quantization reads beside the model, by their absolute paths."""

    calibration: list[str] = []
    measure_on: list[str] = []
    tokenizer: str | None = None

    def completed(self, before: Mapping[str, Any]) -> Inputs:
        """The same, what is left out taken from an earlier run's; where that has none, left out."""
        given = self.model_dump(exclude_defaults=True)
        return parse(Inputs, {**before, **given}, "the unfinished run")

    def open_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that is named.

        Raises:
            TokenizerError: it is none.
        """
        return None if self.tokenizer is None else puna.tokenizer.load(self.tokenizer)


def inputs_of(
    calibration: Sequence[str | Path], measure_on: Sequence[str | Path], tokenizer: str | Path | None
) -> Inputs:
    """The files by their absolute paths, so that a run may go on in another directory."""
    return Inputs(
        calibration=[str(Path(name).absolute()) for name in calibration],
        measure_on=[str(Path(name).absolute()) for name in measure_on],
        tokenizer=None if tokenizer is None else str(Path(tokenizer).absolute()),
    )


def completed(settings: QuantizeSettings, before: Mapping[str, Any]) -> QuantizeSettings:
    """Settings in which what was never given is as in an earlier run's.

    Raises:
        SettingsError: the earlier ones are none that this version knows.
    """
    given = settings.model_dump(mode="json", exclude_unset=True)
    return parse(QuantizeSettings, _over(before, given), "the unfinished run")


def _over(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables, those that are given on top."""
    found = {**before, **given}
    both = [key for key in given if isinstance(given[key], dict) and isinstance(before.get(key), dict)]
    return found | {key: _over(before[key], given[key]) for key in both}


def _exception(text: str) -> tuple[str, str]:
    pattern, equals, how = text.rpartition("=")
    if not equals:
        raise SettingsError(f"--except: expected PATTERN=SCHEME such as '*.down_proj=int8', got {text!r}")
    return pattern, how


def settings_of(values: Mapping[str, Any], origin: str = "settings") -> QuantizeSettings:
    """Settings from plain values, in which the recipe's fields stand at the top.

    Raises:
        SettingsError: in one line, every fault found.
    """
    names = [name for name in QuantizeSettings.model_fields if name != "recipe"]
    beside: dict[str, type[Settings]] = {"calibration": CalibrationSettings, "gptq": GptqSettings}
    recipe = parse(Recipe, {key: value for key, value in values.items() if key not in names}, origin, beside)
    own = {key: value for key, value in values.items() if key in names}
    return parse(QuantizeSettings, {**own, "recipe": recipe}, origin)

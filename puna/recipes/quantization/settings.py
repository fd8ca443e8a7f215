"""What `puna quantize` may be told: a recipe, how much text, how errors are compensated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.errors import SettingsError
from puna.quantize.gptq import GptqSettings
from puna.quantize.recipe import Recipe
from puna.recipes.quantization.calibration import CalibrationSettings
from puna.settings import Settings, overridden, parse, read_toml


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
    recipe = parse(Recipe, {key: value for key, value in values.items() if key not in names}, origin)
    own = {key: value for key, value in values.items() if key in names}
    return parse(QuantizeSettings, {**own, "recipe": recipe}, origin)

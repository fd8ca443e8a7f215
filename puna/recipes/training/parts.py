"""What a run is made of, as its settings say: objective, model, memory, rows; nothing here trains."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from puna import formats
from puna.data.loader import Loader
from puna.data.shards import TokenSet
from puna.model.config import ModelConfig
from puna.model.initial import initialize
from puna.model.llama import Llama
from puna.model.weights import load_weights
from puna.parallel import World
from puna.recipes.training.settings import PretrainSettings
from puna.train import optimizer as optimizers
from puna.train.footprint import Run as Needs
from puna.train.loop import LoopSettings
from puna.train.objectives import Objective, language_modelling
from puna.train.policies import Circumstances, Policy, choose_policy
from puna.train.precision import Precision


def objective(settings: PretrainSettings) -> Objective:
    """What is trained; validation is by `language_modelling` as it is."""
    z = settings.loss.z
    return partial(language_modelling, z=z) if z else language_modelling


def loop_settings(settings: PretrainSettings, steps: int) -> LoopSettings:
    """Those of the loop, for so many updates."""
    return LoopSettings(
        steps=steps, clip_norm=settings.clip_norm, seed=settings.seed, max_skipped=settings.max_skipped
    )


def model_config(settings: PretrainSettings, vocab_size: int) -> ModelConfig:
    """The new model's, or that of the one in `init_from`, which has a vocabulary of its own."""
    if settings.init_from is None:
        return settings.model.config(vocab_size, settings.data.row_length)
    return formats.open_model(Path(settings.init_from)).config


def build_model(settings: PretrainSettings, vocab_size: int) -> Llama:
    """A new model of the settings' shape, or the one in `init_from`."""
    if settings.init_from is None:
        model = Llama(model_config(settings, vocab_size))
        initialize(model, settings.seed)
        return model
    source = formats.open_model(Path(settings.init_from))
    model = Llama(source.config)
    load_weights(model, formats.expanded(source.weights))
    return model


def memory_policy(settings: PretrainSettings, device: torch.device, precision: Precision) -> Policy:
    """What layers keep for the backward pass, known before text is read, which may take hours.

    Raises:
        SettingsError: the policy does not suit the model, the device, or other settings.
    """
    compiling, float8 = settings.compile.mode == "on", settings.precision.float8
    at = Circumstances(device, precision.compute, float8, compiling)
    return choose_policy(settings.memory, _outline(settings), at)


def _outline(settings: PretrainSettings) -> Llama:
    """The model without its numbers, and with a vocabulary of one where that is not known yet."""
    with torch.device("meta"):
        return Llama(model_config(settings, 1))


def needs(settings: PretrainSettings, vocab_size: int, world: World, precision: Precision) -> Needs:
    """What decides about the run's memory; `auto` never keeps less than `paper`."""
    micro, policy = micro_rows(settings, world), settings.memory.policy
    return Needs(
        model_config(settings, vocab_size),
        micro,
        settings.data.row_length,
        "paper" if policy == "auto" else policy,
        precision.compute,
        precision.stored,
        optimizers.bytes_per_number(precision, settings.optimizer.name)["optimizer"],
        settings.batch.rows // (micro * world.size),
    )


def open_loader(settings: PretrainSettings, tokens: TokenSet, world: World) -> Loader:
    """The rows of every batch that are this rank's."""
    return Loader(
        tokens,
        settings.data.row_length,
        settings.batch.rows,
        micro_rows(settings, world),
        seed=settings.seed,
        rank=world.rank,
        world=world.size,
        cross_documents=settings.data.cross_documents,
    )


def micro_rows(settings: PretrainSettings, world: World) -> int:
    """How many rows go through the model at once on one device: all of its share, unless said."""
    return settings.batch.micro_rows or max(1, settings.batch.rows // world.size)

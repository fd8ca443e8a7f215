"""A training run while it goes on: everything it holds, and what happens in it besides updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from puna import formats
from puna.data.loader import Loader, check_division, evaluation_batches
from puna.data.shards import TokenSet
from puna.errors import CheckpointError
from puna.model.config import ModelConfig
from puna.model.counts import flops_per_token, parameters
from puna.model.initial import initialize
from puna.model.llama import Llama
from puna.model.weights import Weights, load_weights, weights_of
from puna.parallel import World
from puna.plan.measure import Peak, measure_peak
from puna.progress import Track, quantity, silent
from puna.recipes.training.corpus import Corpus, open_corpus
from puna.recipes.training.length import Pace, seconds_per_update, steps_for
from puna.recipes.training.samples import check_prompts, write_samples
from puna.recipes.training.settings import PretrainSettings
from puna.recipes.training.validation import Validation, validate
from puna.train import checkpoint as checkpoints
from puna.train import optimizer as optimizers
from puna.train.compile import Layers, prepare_layers
from puna.train.footprint import Run as Needs
from puna.train.footprint import check_fits
from puna.train.loop import LoopSettings, TrainState, rehearse, train
from puna.train.memory import memory_errors
from puna.train.metrics import MetricsLog
from puna.train.objectives import Objective, language_modelling
from puna.train.policies import Circumstances, choose_policy
from puna.train.precision import Precision
from puna.train.report import write_report
from puna.train.run import RunDirectory
from puna.train.schedule import check as check_schedule
from puna.train.schedule import learning_rate

Say = Callable[[str], None]


@dataclass
class Session:
    """Everything one run holds while it trains; every rank has one."""

    settings: PretrainSettings
    run: RunDirectory
    world: World
    device: torch.device
    precision: Precision
    corpus: Corpus
    config: ModelConfig
    model: Llama
    layers: Layers
    optimizer: optimizers.Optimizer
    loader: Loader
    peak: Peak | None
    say: Say
    track: Track
    state: TrainState
    began: float
    log: MetricsLog | None = None

    @classmethod
    def open(
        cls,
        settings: PretrainSettings,
        run: RunDirectory,
        world: World,
        device: torch.device,
        precision: Precision,
        say: Say,
        track: Track,
        began: float,
    ) -> Session:
        """Tokenizer, tokens, model, and the number of steps.

        Raises:
            InputError: text, tokenizer, model or settings do not fit together.
        """
        settings.check()
        check_division(settings.batch.rows, _micro_rows(settings, world), world.size)
        mode, float8 = settings.compile.mode, settings.precision.float8
        circumstances = Circumstances(device, precision.compute, float8, compiling=mode == "on")
        choose_policy(settings.memory, _outline(settings), circumstances)  # before the text, which takes long
        corpus = open_corpus(settings, run.path, world, say, track)
        check_fits(_needs(settings, corpus, world, precision), device)
        with memory_errors("making the model"):
            config, model = _build_model(settings, corpus)
            model.to(device, precision.stored)
        check_prompts(model, corpus.tokenizer, settings.samples.prompts)
        loader = _loader(settings, corpus.train, world)
        batch = next(iter(loader.steps(0))).batches[0].to(device)

        def trial() -> None:
            rehearse(_objective(settings), model, batch, precision)

        policy = choose_policy(settings.memory, model, circumstances)
        if mode != "off" and policy == "none":
            say("Compiling the layers, where there is a compiler; it is kept for the next run")
        # Memory that does not suffice runs out here, where the run can still be undone.
        layers = prepare_layers(model, policy, mode, device, trial, say, float8=float8)
        session = cls(
            settings, run, world, device, precision, corpus, config, model, layers,
            optimizers.build(model, settings.optimizer, precision, settings.seed), loader, None, say, track,
            TrainState(), began,
        )  # fmt: skip
        session.settings = session._with_steps()
        check_schedule(session.settings.schedule, session.steps)
        session.peak = measure_peak(device, precision.compute)
        session._introduce()
        return session

    @property
    def steps(self) -> int:
        """How many updates the run makes."""
        assert self.settings.length.steps is not None
        return self.settings.length.steps

    @cached_property
    def sampled(self) -> TokenSet:
        """The held-out documents that validation during training reads."""
        return self.corpus.validation.sample(self.settings.validation.tokens)

    @property
    def tokens_per_step(self) -> int:
        """Positions one update learns from, on all ranks."""
        return self.settings.batch.rows * self.settings.data.row_length

    def train_and_finish(self, offset: int | None, changes: list[str]) -> dict[str, Any]:
        """Train to the end; then score, export and report. `offset` is what `take_up_newest` gave."""
        if self.world.leads:
            self.run.store(self.settings)
        tensorboard = self.run.tensorboard if self.world.leads else None
        path, offset = (self.run.metrics, offset) if self.world.leads else (Path("/dev/null"), None)
        with MetricsLog(
            path, offset=offset, tensorboard=tensorboard, step=self.state.step, say=self.say
        ) as log:
            self.log = log if self.world.leads else None
            for line in changes:
                self._record("event", step=self.state.step, text=line)
            if self.state.served < self.steps:  # or at its end, which skipped steps may reach unvalidated
                self._train()
            return self._finish()

    def validate(self, state: TrainState) -> None:
        """Score a sample of the held-out documents; the best model so far is exported."""
        score = self._score(self.sampled)
        self._record(
            "validation", step=state.step, loss=score.loss, perplexity=score.perplexity,
            bits_per_byte=score.bits_per_byte,
        )  # fmt: skip
        self.say(
            f"step {state.step:>6}  validation loss {score.loss:.4f}  perplexity {score.perplexity:.2f}  "
            f"bits per byte {score.bits_per_byte:.4f}"
        )
        # What init_from began with is no result: a run that only made it worse still exports its best.
        if state.step > 0 and state.improved(score.loss) and self.world.leads:
            self.export()

    def write_samples(self, state: TrainState) -> None:
        """Let the model write, on the first rank."""
        if not self.world.leads:
            return
        wanted = self.settings.samples
        with self.layers.replaced.eager():
            samples = write_samples(
                self.model, self.corpus.tokenizer, wanted.prompts, wanted.new_tokens, wanted.temperature,
                self.settings.seed,
            )  # fmt: skip
        for sample in samples:
            self._record("sample", step=state.step, prompt=sample.prompt, text=sample.text)
            self.say(f"step {state.step:>6}  it writes: {sample.prompt}{sample.text}\n")

    def save_if_due(self, state: TrainState) -> None:
        """Save at the interval, at a new best, and at the end."""
        last, best = state.step == self.steps, state.step == state.best_step
        if state.step and (state.step % self.settings.checkpoint.every == 0 or last or best):
            self.save(state)

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, on the first rank, and drop those no longer wanted."""
        if not self.world.leads:
            return
        assert self.log is not None
        tensors: dict[str, Mapping[str, torch.Tensor]] = {
            "model": dict(self.model.named_parameters()),
            "optimizer": optimizers.state_tensors(self.optimizer),
        }
        values = {
            "train": state.values(),
            "metrics": {"offset": self.log.sync()},
            "corpus": self.corpus.identity,
        }
        checkpoints.save(self.run.checkpoints, state.step, tensors, values)
        wanted = self.settings.checkpoint
        checkpoints.prune(
            self.run.checkpoints, wanted.keep_last, state.best_step if wanted.keep_best else None
        )

    def export(self) -> None:
        """The weights as they are become the run's model directory."""
        summary = {
            "recipe": "pretrain",
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "row_length": self.settings.data.row_length,
            "validation_loss": self.state.best_loss,
            "init_from": self.settings.init_from,
        }
        self.run.export(
            lambda directory: formats.save(
                directory, weights_of(self.model), self.corpus.tokenizer, training=summary
            )
        )

    def _train(self) -> None:
        wanted = self.settings
        every = [
            (wanted.validation.every or math.ceil(self.steps / 10), self.validate),
            (wanted.samples.every or math.ceil(self.steps / 5), self.write_samples),
            (1, self.save_if_due),
        ]
        with self.track("Training", self.steps * self.tokens_per_step, "tok") as bar:
            console, self.say = self.say, bar.say if self.world.leads else self.say
            bar.start_at(self.state.step * self.tokens_per_step)
            train(
                _objective(wanted),
                self.model,
                self.optimizer,
                self.loader,
                self.state,
                settings=self._loop_settings(self.steps),
                rate=self._rate,
                precision=self.precision,
                world=self.world,
                every=every,
                save=self.save,
                record=self._record,
                bar=bar,
                peak=self.peak,
                flops_per_token=flops_per_token(self.config, wanted.data.row_length, training=True),
            )
            self.say = console

    def _finish(self) -> dict[str, Any]:
        """The best model scored on all that was held out, the summary, the report."""
        if self.world.leads:
            if not self.run.model.is_dir():  # no validation was finite
                self.export()
            load_weights(self.model, formats.open_model(self.run.model).weights)
        self.world.broadcast(list(self.model.parameters()))
        score = self._score(
            self.corpus.validation, overlap=self.settings.data.row_length // 2, label="Scoring"
        )
        compression = self.corpus.compression()
        yardsticks = {"gzip": compression.gzip, "xz": compression.xz} if compression else {}
        result = {
            "run": str(self.run.path),
            "model": str(self.run.model),
            "report": str(self.run.report),
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "parameters": parameters(self.config).total,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            **yardsticks,
        }
        if self.world.leads:
            self._record("summary", step=self.state.step, **result)
            write_report(self.run.path)
            self._conclude(score, yardsticks)
        return result

    def _conclude(self, score: Validation, yardsticks: dict[str, float]) -> None:
        beside = "".join(f", {name} -9 {bits:.3f}" for name, bits in yardsticks.items())
        self.say(
            f"Held-out text, {score.tokens:,} tokens: loss {score.loss:.4f}, "
            f"perplexity {score.perplexity:.2f}, bits per byte {score.bits_per_byte:.3f}{beside}\n"
            f"Model:  {self.run.model}\nReport: {self.run.report}"
        )

    def _score(self, tokens: TokenSet, overlap: int = 0, label: str = "Validating") -> Validation:
        wanted = self.settings.data
        batches = evaluation_batches(
            tokens,
            wanted.row_length,
            self.loader.micro_rows,
            overlap=overlap,
            cross_documents=wanted.cross_documents,
        )
        return validate(
            language_modelling, self.model, batches, tokens.bytes_total, self.precision, self.world,
            self.track if overlap else silent, label, tokens.tokens_total,
        )  # fmt: skip

    def _record(self, kind: str, **values: Any) -> None:
        if self.log is not None:
            self.log.write(kind, **values)

    def _rate(self, step: int) -> float:
        return learning_rate(self.settings.schedule, self.settings.optimizer.learning_rate, step, self.steps)

    def _loop_settings(self, steps: int) -> LoopSettings:
        wanted = self.settings
        return LoopSettings(
            steps=steps, clip_norm=wanted.clip_norm, seed=wanted.seed, max_skipped=wanted.max_skipped
        )

    def take_up_newest(self) -> int | None:
        """Go on from the newest whole checkpoint, if there is one; the length of the metrics file then.

        The first rank looks before the others do, because it sets aside what is not whole. The checkpoint is
        let go of on return: it keeps its files on the disk for as long as it is held.
        """
        if not self.world.leads:
            self.world.barrier()
        found = checkpoints.newest(self.run.checkpoints, self.say)
        if self.world.leads:
            self.world.barrier()
        return self._restore(found) if found else None

    def _restore(self, found: checkpoints.Checkpoint) -> int:
        """Take up a checkpoint; the length of the metrics file at that moment."""
        if found.values["corpus"] != self.corpus.identity:
            raise CheckpointError(
                f"{found.path}: made with other text or another tokenizer than the run's settings name now; "
                "put them back, or start in another directory"
            )
        load_weights(self.model, Weights(self.config, list(found.tensors["model"].items())))
        optimizers.load_state_tensors(self.optimizer, found.tensors["optimizer"])
        self.state = TrainState.from_values(found.values["train"])
        self.say(f"Continuing at step {self.state.step} of {self.steps}")
        return int(found.values["metrics"]["offset"])

    def _with_steps(self) -> PretrainSettings:
        """The settings with the number of steps that the length comes to, the same on every rank."""
        settings = self.settings
        if settings.length.steps is not None:
            return settings
        pace = Pace(
            rows=settings.batch.rows,
            tokens=self.tokens_per_step,
            rows_per_epoch=self.loader.rows,
            # ten validations and the one at step 0, then all of it, with half of each row read twice
            scored=11 * self.sampled.tokens_total + 2 * self.corpus.validation.tokens_total,
            began=self.began,
            seconds_per_step=self._seconds_per_step,
        )
        steps = steps_for(settings.length, pace)
        steps = int(self.world.sum_scalars([float(steps) if self.world.leads else 0.0])[0])
        if settings.length.minutes is not None:  # asked for by the clock: a slow machine still makes a run
            steps = max(steps, settings.schedule.warmup_steps + 1)
        known = {"steps": steps}
        return settings.model_copy(update={"length": settings.length.model_copy(update=known)})

    def _seconds_per_step(self) -> float:
        """Measured on real updates of the real model, which is then put back as it was."""
        weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        seconds = seconds_per_update(self._updates, self._mean, self.track)
        self.model.load_state_dict(weights)
        wanted = self.settings
        self.optimizer = optimizers.build(self.model, wanted.optimizer, self.precision, wanted.seed)
        return seconds

    def _mean(self, value: float) -> float:
        return self.world.sum_scalars([value])[0] / self.world.size

    def _updates(self, steps: int) -> None:
        """Updates at a rate of zero, as a run would make them."""
        train(
            _objective(self.settings), self.model, self.optimizer, self.loader, TrainState(),
            settings=self._loop_settings(steps), rate=lambda step: 0.0, precision=self.precision,
            world=self.world,
        )  # fmt: skip

    def _introduce(self) -> None:
        data, batch = self.settings.data, self.settings.batch
        held_out = self.corpus.validation.tokens_total
        self.say(
            f"Model: {parameters(self.config).total:,} parameters; {self.steps:,} updates of {batch.rows} × "
            f"{data.row_length} tokens ({quantity(self.steps * self.tokens_per_step)} in all, "
            f"{self.steps * batch.rows / self.loader.rows:.2f} epochs)\n"
            f"Computing on {self.device} in {self.precision}, "
            f"{self.layers}; measured limit {self.peak}\n"
            f"Validation while training is on {self.sampled.tokens_total:,} of the {held_out:,} "
            "held-out tokens, at the end on all"
        )


def _objective(settings: PretrainSettings) -> Objective:
    """What is trained; validation is by `language_modelling` as it is."""
    z = settings.loss.z
    return partial(language_modelling, z=z) if z else language_modelling


def _build_model(settings: PretrainSettings, corpus: Corpus) -> tuple[ModelConfig, Llama]:
    """A new model of the settings' shape, or the one in `init_from`."""
    if settings.init_from is None:
        config = _config(settings, corpus.tokenizer.vocab_size)
        model = Llama(config)
        initialize(model, settings.seed)
        return config, model
    source = formats.open_model(Path(settings.init_from))
    model = Llama(source.config)
    load_weights(model, formats.expanded(source.weights))
    return source.config, model


def _outline(settings: PretrainSettings) -> Llama:
    """The model without its numbers, and with a vocabulary of one where that is not known yet."""
    with torch.device("meta"):
        return Llama(_config(settings, 1))


def _config(settings: PretrainSettings, vocab_size: int) -> ModelConfig:
    """The new model's, or that of the one in `init_from`, which has a vocabulary of its own."""
    if settings.init_from is None:
        return settings.model.config(vocab_size, settings.data.row_length)
    return formats.open_model(Path(settings.init_from)).config


def _needs(settings: PretrainSettings, corpus: Corpus, world: World, precision: Precision) -> Needs:
    """What decides about the run's memory; `auto` never keeps less than `paper`."""
    micro, policy = _micro_rows(settings, world), settings.memory.policy
    return Needs(
        _config(settings, corpus.tokenizer.vocab_size),
        micro,
        settings.data.row_length,
        "paper" if policy == "auto" else policy,
        precision.compute,
        precision.stored,
        optimizers.bytes_per_number(precision, settings.optimizer.name)["optimizer"],
        settings.batch.rows // (micro * world.size),
    )


def _loader(settings: PretrainSettings, tokens: TokenSet, world: World) -> Loader:
    return Loader(
        tokens,
        settings.data.row_length,
        settings.batch.rows,
        _micro_rows(settings, world),
        seed=settings.seed,
        rank=world.rank,
        world=world.size,
        cross_documents=settings.data.cross_documents,
    )


def _micro_rows(settings: PretrainSettings, world: World) -> int:
    return settings.batch.micro_rows or max(1, settings.batch.rows // world.size)

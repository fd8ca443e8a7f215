"""A run while it goes on: updates, and between them validation, samples, checkpoints, export."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from puna import formats
from puna.data.loader import Loader, evaluation_batches
from puna.data.shards import TokenSet
from puna.errors import CheckpointError, ModelError
from puna.model.counts import flops_per_token, parameters
from puna.model.llama import Llama
from puna.model.weights import Weights, load_weights, weights_of
from puna.parallel import World
from puna.plan.measure import Peak
from puna.progress import Track, silent
from puna.recipes.training import parts
from puna.recipes.training.corpus import Corpus
from puna.recipes.training.samples import write_samples
from puna.recipes.training.settings import PretrainSettings
from puna.recipes.training.validation import Validation, validate
from puna.train import checkpoint as checkpoints
from puna.train import optimizer as optimizers
from puna.train.compile import Layers
from puna.train.loop import TrainState, train
from puna.train.metrics import MetricsLog
from puna.train.objectives import language_modelling
from puna.train.precision import Precision
from puna.train.report import write_report
from puna.train.run import RunDirectory
from puna.train.schedule import learning_rate

Say = Callable[[str], None]


@dataclass
class Session:
    """Everything one run holds while it trains; every rank has one."""

    settings: PretrainSettings
    run: RunDirectory
    world: World
    precision: Precision
    corpus: Corpus
    model: Llama
    layers: Layers
    optimizer: optimizers.Optimizer
    loader: Loader
    say: Say
    track: Track
    peak: Peak | None = None
    state: TrainState = field(default_factory=TrainState)
    log: MetricsLog | None = None

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
                parts.objective(wanted),
                self.model,
                self.optimizer,
                self.loader,
                self.state,
                settings=parts.loop_settings(wanted, self.steps),
                rate=self._rate,
                precision=self.precision,
                world=self.world,
                every=every,
                save=self.save,
                record=self._record,
                bar=bar,
                peak=self.peak,
                flops_per_token=flops_per_token(self.model.config, wanted.data.row_length, training=True),
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
            "parameters": parameters(self.model.config).total,
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
            f"Held-out text, {score.tokens:,} tokens, each after at least half a row: loss {score.loss:.4f}, "
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
        try:
            load_weights(self.model, Weights(self.model.config, list(found.tensors["model"].items())))
        except ModelError as error:
            raise CheckpointError(
                f"{found.path}: of another model than the run's settings name now ({error}); put them back, "
                "or start in another directory"
            ) from None
        optimizers.load_state_tensors(self.optimizer, found.tensors["optimizer"])
        self.state = TrainState.from_values(found.values["train"])
        self.say(f"Continuing at step {self.state.step} of {self.steps}")
        return int(found.values["metrics"]["offset"])

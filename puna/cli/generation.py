"""The commands that make answers: generate, chat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from puna.cli.importing import quickly
from puna.cli.options import (
    Json,
    Model,
    Opening,
    Sampling,
    Seed,
    Template,
    given,
    opens_a_model,
)
from puna.cli.printing import announce, emit, note, write
from puna.errors import InputError

if TYPE_CHECKING:
    from puna.engine.llm import LLM


@opens_a_model
def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; several make one batch.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file of prompts: JSON lines, each with a prompt (text or ids) or messages, perhaps an id "
            "and sampling settings of its own; or .txt, a prompt in each line. It may be compressed (.gz, "
            ".zst); - is standard input, in JSON lines.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            help="With --prompts: where JSON lines of answers go, in the order they finish; standard output "
            "without it.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --out, or start where nothing is there.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens that hold this much.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Keep tokens at least this share of the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 makes repetition rarer.")] = None,
    seed: Seed = None,
    n: Annotated[int | None, typer.Option("--n", help="How many answers to each prompt.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends the answer; may be given several times.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to the limit.")] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json or --prompts: log-probabilities, of this many likely tokens too."),
    ] = None,
    json_schema: Annotated[
        str | None, typer.Option(help="Answer in JSON that this schema admits: a file, or JSON; true is any.")
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The whole answer matches it.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The answer is one of these; given several times.")
    ] = None,
    grammar: Annotated[Path | None, typer.Option(help="A file: the answer is of this grammar.")] = None,
    change: Sampling = None,
    template: Template = None,
    opening: Opening = Opening(),
    as_json: Json = False,
) -> None:
    """Continue a prompt, several, or a file of any number of them.

    Exit code 3: some lines of the file could not be answered; their errors stand among the answers.
    """
    loading = announce("Loading …")  # libraries, then the model
    with quickly():
        from puna.errors import CheckFailed
        from puna.progress import on_stderr
        from puna.recipes.answering.generate import generate as run
        from puna.recipes.answering.options import sampling_options

    if (prompt is None) == (prompts is None):
        raise InputError("give either --prompt TEXT, which may be repeated, or --prompts FILE")
    chosen = given(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, n=n, stop=stop, ignore_eos=ignore_eos,
        logprobs=logprobs, regex=regex, choice=choice,
    )  # fmt: skip
    options = sampling_options(chosen, change or (), json_schema=json_schema, grammar=grammar)

    def opened() -> LLM:
        llm = opening.llm(model, note, options.engine)
        loading()
        return llm

    if prompt is not None:
        if out is not None or resume or template is not None:
            raise InputError("--out, --resume and --template go with --prompts FILE")
        if not as_json and ("logprobs" in options.sampling or "prompt_logprobs" in options.sampling):
            raise InputError("log-probabilities are shown in JSON alone; add --json, or give --prompts FILE")
        emit(run(opened(), prompt, options.sampling, write, note), as_json)
        return
    from puna.recipes.answering.generate_file import FileJob, generate_file

    assert prompts is not None
    job = FileJob(prompts, out or "-", options, template, resume)
    result = generate_file(job, opened, write, on_stderr)
    emit(result, as_json)
    if result["failed"]:
        raise CheckFailed(
            f"{result['failed']:,} of {result['lines']:,} lines failed; their errors stand among the answers"
        )


@opens_a_model
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    load: Annotated[
        Path | None, typer.Option(help="A conversation that /save kept, to go on from.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens that hold this much.")
    ] = None,
    seed: Seed = None,
    change: Sampling = None,
    template: Template = None,
    opening: Opening = Opening(),
) -> None:
    """Talk with a model in the terminal.

    /help tells the commands; Ctrl-C stops an answer, Ctrl-D ends. Where messages are piped in, the exit code
    is 2 if one of them could not be answered.
    """
    loading = announce("Loading …")
    with quickly():
        from puna.recipes.answering.chat import chat as run
        from puna.recipes.answering.options import sampling_options
        from puna.recipes.answering.terminal import is_person, line_reader

    chosen = given(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    options = sampling_options(chosen, change or (), several=False)
    llm = opening.llm(model, note, options.engine)
    loading()
    failed = run(
        llm, options.sampling, system=system, template=template, start=load, read=line_reader(),
        write=write, note=note, person=is_person(),
    )  # fmt: skip
    if failed and not is_person():
        messages = "1 message" if failed == 1 else f"{failed:,} messages"
        raise InputError(f"{messages} could not be answered; the remarks above say why")

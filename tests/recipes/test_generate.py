"""Files of prompts: every line's answer is what it would be alone, and a killed run leaves nothing else."""

from __future__ import annotations

import errno
import fcntl
import gzip
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

import puna
from puna.engine.llm import LLM
from puna.engine.params import SamplingParams
from puna.errors import DataError, InputError, Interrupted, ResourceError, RunBusyError, SettingsError
from puna.model.weights import weights_of
from puna.progress import on_stderr, silent
from puna.recipes.answering import answer_files, generate_file
from puna.recipes.answering.generate import answered, generate
from puna.recipes.answering.generate_file import FileJob, fingerprint
from puna.recipes.answering.options import sampling_options, seed_of
from puna.recipes.answering.prompt_files import read_prompts
from puna.settings import parse

GIVEN = {"max_new_tokens": 12, "seed": 5, "temperature": 0.9}
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
LINES: list[dict[str, Any]] = [
    {"prompt": "the llama walks"},
    {"prompt": [5, 9, 300], "id": "ids"},
    {"prompt": "", "id": 3, "temperature": 0.0},
    {"prompt": "high plain", "seed": 11, "max_new_tokens": 30},
    {"messages": [{"role": "user", "content": "grass?"}]},
    {"prompt": "slow clouds", "logprobs": 2, "max_new_tokens": 4},
    {"prompt": "ü \ud83d", "n": 2, "max_new_tokens": 3},  # half a surrogate pair: JSON can hold it
]


@pytest.fixture(scope="module")
def llm(finished: tuple[Path, dict[str, Any]]) -> LLM:
    return puna.load(finished[0], device="cpu", dtype="float32")


def write_lines(path: Path, lines: list[dict[str, Any]] = LINES) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def job_of(prompts: str | Path, out: str | Path, resume: bool = False, **given: Any) -> FileJob:
    return FileJob(str(prompts), str(out), sampling_options({**GIVEN, **given}), TEMPLATE, resume)


def answer(llm: LLM, job: FileJob, write: Any = print) -> dict[str, Any]:
    return generate_file.generate_file(job, lambda: llm, write, silent)


def answers_in(path: Path) -> list[dict[str, Any]]:
    """In the order of the prompts."""
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: line["line"])


def test_every_line_gets_the_answer_it_would_get_alone(llm: LLM, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl")
    result = answer(llm, job_of(prompts, tmp_path / "out.jsonl"))
    found = answers_in(tmp_path / "out.jsonl")
    assert [line["line"] for line in found] == list(range(1, len(LINES) + 1))
    for number, (asked, said) in enumerate(zip(LINES, found, strict=True), 1):
        own = {key: value for key, value in asked.items() if key not in ("prompt", "messages", "id")}
        sampling = {**GIVEN, "seed": seed_of(5, number), **own}
        if "messages" in asked:
            alone = llm.chat(asked["messages"], template=TEMPLATE, **sampling)
        else:
            alone = llm.generate(asked["prompt"], **sampling)
        named = {key: asked[key] for key in ("id", "prompt", "messages") if key in asked}
        named["seed"] = sampling["seed"]
        assert said == json.loads(json.dumps({"line": number, **named, **answered(alone)}))
    assert [len(line.get("alternatives", ())) for line in found] == [0, 0, 0, 0, 0, 0, 1]
    assert (result["lines"], result["failed"]) == (7, 0)
    alternatives = [other for line in found for other in line.get("alternatives", ())]
    assert result["tokens"] == sum(len(line["tokens"]) for line in [*found, *alternatives])


def test_lines_differ_by_their_number_and_runs_by_their_seed(llm: LLM, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "the llama"}] * 6)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        answer(llm, job_of(prompts, tmp_path / name, seed=seed))
    texts = {name: [line["text"] for line in answers_in(tmp_path / name)] for name in "abc"}
    assert texts["a"] == texts["b"]
    assert len(set(texts["a"])) == 6
    assert texts["a"][1:] == texts["c"][:5]  # seed 5's line 2 and seed 6's line 1 have the same numbers
    assert [line["seed"] for line in answers_in(tmp_path / "c")] == [6, 7, 8, 9, 10, 11]


def test_an_answer_can_be_made_again_by_the_seed_that_it_tells(llm: LLM, tmp_path: Path) -> None:
    """Nobody gave one; and null in a line is as good as none."""
    lines = [{"prompt": "the llama"}, {"prompt": "the llama", "seed": None}, {"prompt": "the llama"}]
    unseeded = sampling_options({"max_new_tokens": 12})
    answer(llm, FileJob(str(write_lines(tmp_path / "prompts.jsonl", lines)), str(tmp_path / "out"), unseeded))
    found = answers_in(tmp_path / "out")
    first = found[0]["seed"]
    assert [line["seed"] for line in found] == [first, first + 1, first + 2]
    for line in found:
        alone = llm.generate("the llama", max_new_tokens=12, seed=line["seed"])
        assert list(alone.tokens) == line["tokens"]
    written: list[str] = []
    for prompts in (["the llama"], ["the llama", "the llama"]):
        result = generate(llm, prompts, {"max_new_tokens": 12}, written.append, written.append)
        for record in result["completions"]:
            alone = llm.generate("the llama", max_new_tokens=12, seed=record["seed"])
            assert list(alone.tokens) == record["tokens"]
    again = generate(llm, ["the llama"] * 3, {"seed": first, "max_new_tokens": 12}, str, str)["completions"]
    assert [record["tokens"] for record in again] == [line["tokens"] for line in found]
    assert seed_of(2**63 - 1, 2) == 0  # the largest there is begins anew


def test_wherever_it_was_killed_it_goes_on_to_the_same_lines(llm: LLM, tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    answer(llm, job_of(prompts, whole))
    written = whole.read_bytes()
    ends = [at + 1 for at, byte in enumerate(written) if byte == ord("\n")]
    for cut in [
        0,
        1,
        ends[0] - 1,
        ends[0],
        ends[0] + 1,
        ends[2] + 40,
        ends[4],
        len(written) - 1,
        len(written),
    ]:
        out.write_bytes(written[:cut])
        (tmp_path / "out.jsonl.puna.json").write_bytes((tmp_path / "whole.jsonl.puna.json").read_bytes())
        answer(llm, job_of(prompts, out, resume=True))
        kept = max([end for end in ends if end <= cut], default=0)
        assert out.read_bytes()[:kept] == written[:kept]
        assert sorted(out.read_bytes().splitlines()) == sorted(written.splitlines())


def test_a_run_without_a_seed_resumes_with_the_one_it_had(llm: LLM, tmp_path: Path) -> None:
    prompts, out = write_lines(tmp_path / "prompts.jsonl"), tmp_path / "out.jsonl"
    unseeded = sampling_options({"max_new_tokens": 12})
    first = answer(llm, FileJob(str(prompts), str(out), unseeded, TEMPLATE))
    written = out.read_bytes()
    out.write_bytes(written[:200])
    again = answer(llm, FileJob(str(prompts), str(out), unseeded, TEMPLATE, resume=True))
    assert again["seed"] == first["seed"]
    assert sorted(out.read_bytes().splitlines()) == sorted(written.splitlines())


def test_killed_by_the_system_it_loses_no_line(llm: LLM, tmp_path: Path) -> None:
    """kill -9 while lines are written; other settings of the engine do not matter."""
    lines = [{"prompt": "the llama", "max_new_tokens": 2 + number % 9} for number in range(80)]
    prompts, out = write_lines(tmp_path / "prompts.jsonl", lines), tmp_path / "out.jsonl"
    options = ["--seed", "3", "--device", "cpu", "--dtype", "float32", "--set", "engine.max_running=4"]
    files = ["--prompts", str(prompts), "--out", str(out)]
    killed = subprocess.Popen(
        [sys.executable, "-m", "puna", "generate", str(llm.source), *files, *options],
        stderr=subprocess.DEVNULL,
    )
    while not out.exists() or out.stat().st_size < 600:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    torn = out.read_bytes()
    assert 0 < torn.count(b"\n") < 80

    sampling = sampling_options({"max_new_tokens": 256, "temperature": 0.8, "seed": 3, "ignore_eos": False})
    resumed = FileJob(str(prompts), str(out), sampling, resume=True)
    assert answer(llm, resumed)["lines"] == 80
    whole = out.read_bytes()
    assert whole.startswith(torn[: torn.rfind(b"\n") + 1])
    straight: list[str] = []
    answer(llm, FileJob(str(prompts), "-", sampling), straight.append)
    assert sorted("".join(straight).encode().splitlines()) == sorted(whole.splitlines())


FAULTS: list[tuple[bytes, str]] = [
    (b'{"prompt": [true]}', "a list of something else"),
    (b'{"messages": [1]}', "objects with a role and content"),
    (b'{"prompt": "x", "id": NaN}', "finite number"),
    (b'{"prompt": "x"', "not JSON"),
    (b'["x"]', "expected an object, got list"),
    (b'{"prompt": "x", "temprature": 1}', "unknown field 'temprature'. Did you mean 'temperature'?"),
    (b'{"promt": "x"}', "unknown field 'promt'. Did you mean 'prompt'?"),
    (b'{"id": 1}', "either 'prompt' or 'messages'"),
    (b'{"prompt": "x", "messages": []}', "either 'prompt' or 'messages'"),
    (b'{"prompt": 7}', "'prompt' must be text or a list of token ids, got int"),
    (b'{"messages": "hi"}', "'messages' must be a list"),
    (b'{"messages": [{"content": "hi"}]}', "message 1"),
    (b'{"messages": []}', ""),
    (b'{"messages": [' + b"[" * 500 + b"]" * 500 + b"]}", ""),
    (b'{"messages": [{"role": "user", "content": ' + b"[" * 400 + b"]" * 400 + b"}]}", "nested"),
    (b'{"prompt": "x", "id": []}', "'id' must be text or a finite number, got list"),
    (b'{"prompt": [1, 999999]}', "999999 is not in the model's vocabulary"),
    (b'{"prompt": ["a", "b"]}', "token ids"),
    (b'{"prompt": []}', "empty"),
    (b'{"prompt": "x", "temperature": -1}', "'temperature'"),
    (b'{"prompt": "x", "temperature": NaN}', "'temperature'"),
    (b'{"prompt": "' + b"the llama " * 400 + b'"}', "tokens; this model takes"),
    (b'\xff{"prompt": "x"}', "the line is not UTF-8: byte 0"),
    (b'{"prompt": "x\xff"}', "the line is not UTF-8: byte 13"),
    ('{"prompt": "x"}'.encode("utf-16-le"), "not JSON"),
    (b'{"zzzz": 1}', "unknown field 'zzzz'. Fields: id, prompt, messages, max_new_tokens, "),
]


def test_a_line_at_fault_says_so_and_harms_no_other(llm: LLM, tmp_path: Path) -> None:
    good = b'{"prompt": "the llama"}\n'
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(good + b"\n" + b"".join(line + b"\n" + good for line, _ in FAULTS))
    result = answer(llm, job_of(prompts, tmp_path / "out.jsonl"))
    found = {line["line"]: line for line in answers_in(tmp_path / "out.jsonl")}
    assert 2 not in found  # a blank line asks for nothing
    for number, (line, message) in enumerate(FAULTS):
        said = found[3 + 2 * number]
        assert message in said["error"], line
        assert set(said) <= {"line", "id", "error"}
        beside = 4 + 2 * number
        alone = llm.generate("the llama", **{**GIVEN, "seed": seed_of(5, beside)})
        assert found[beside]["tokens"] == list(alone.tokens)
    assert (result["failed"], result["lines"]) == (len(FAULTS), 2 * len(FAULTS) + 1)
    # They are answers too: what is done is not done again, and counted still.
    assert answer(llm, job_of(prompts, tmp_path / "out.jsonl", resume=True))["failed"] == len(FAULTS)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_answers_are_kept_in_a_regular_file_only(llm: LLM, tmp_path: Path, kind: str) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    if kind == "pipe":
        os.mkfifo(out)
    else:
        out.symlink_to(tmp_path / "nowhere")
    for resume in (False, True):
        with pytest.raises(DataError, match="no regular file"):
            answer(llm, job_of(prompts, out, resume=resume))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def piped(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)))  # type: ignore[arg-type]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_what_is_piped_may_be_compressed(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    data = b"".join(json.dumps({"prompt": f"the llama {number}"}).encode() + b"\n" for number in range(5))
    monkeypatch.setattr(sys, "stdin", piped(pack(data)))
    written: list[str] = []
    assert answer(llm, job_of("-", "-"), written.append)["failed"] == 0
    assert {json.loads(line)["prompt"] for line in written} == {f"the llama {number}" for number in range(5)}


def test_what_is_piped_and_damaged_is_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", piped(gzip.compress(b'{"prompt": "x"}\n' * 999)[:-9]))
    with pytest.raises(DataError, match="standard input: damaged"):
        answer(llm, job_of("-", "-"), lambda line: None)


@pytest.mark.parametrize("data", [b"Once upon a time\nThe end\n", b"\n[1, 2]\n", "Once\n".encode("utf-16")])
def test_what_is_piped_and_no_json_is_told_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(sys, "stdin", piped(data))
    with pytest.raises(DataError, match="standard input must be JSON lines"):
        answer(llm, job_of("-", "-"), lambda line: pytest.fail("answered"))
    monkeypatch.setattr(sys, "stdin", piped(b'{"prompt": "x"}\nplain\n'))
    assert answer(llm, job_of("-", "-"), lambda line: None)["failed"] == 1


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.ndjson.zst", "p.txt", "p.txt.gz", "-"])
def test_prompts_may_be_compressed_plain_or_piped(
    llm: LLM, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["the llama", "grass", " ", "wind"]
    lines = [text if ".txt" in name else json.dumps({"prompt": text}) for text in texts]
    data = "\r\n".join(lines).encode()
    if name == "-":
        monkeypatch.setattr(sys, "stdin", piped(data))
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)(data)
    (tmp_path / name).write_bytes(packed)
    written: list[str] = []
    answer(llm, job_of(name if name == "-" else tmp_path / name, "-"), written.append)
    found = sorted(map(json.loads, written), key=lambda line: line["line"])
    asked = texts if ".txt" not in name else ["the llama", "grass", "wind"]
    assert [line["prompt"] for line in found] == asked
    assert found[-1]["line"] == 4
    assert found[1]["tokens"] == list(llm.generate("grass", **{**GIVEN, "seed": seed_of(5, 2)}).tokens)


REFUSED: list[tuple[str, bytes, str]] = [
    ("p.csv", b"a,b", r"read from \.jsonl or \.txt"),
    ("p.jsonl", b"\n \n", "holds no prompts"),
    ("p.jsonl.gz", gzip.compress(b"{}\n" * 999)[:-9], "damaged"),
    ("p.jsonl.zst", b"no", "damaged"),
]


@pytest.mark.parametrize(("name", "data", "message"), REFUSED)
def test_unusable_files_are_refused_before_a_model_is_opened(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    for prompts, told in ((name, message), ("nowhere.jsonl", "No such file")):
        with pytest.raises(DataError, match=told):
            generate_file.generate_file(
                job_of(tmp_path / prompts, tmp_path / "out"), lambda: pytest.fail("opened"), print, silent
            )
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_was_made_otherwise_is_not_mixed(llm: LLM, tmp_path: Path) -> None:
    prompts, out = write_lines(tmp_path / "prompts.jsonl"), tmp_path / "out.jsonl"
    answer(llm, job_of(prompts, out))
    before = out.read_bytes()

    def refused(job: FileJob, message: str, with_llm: LLM = llm) -> None:
        with pytest.raises(DataError, match=message) as raised:
            answer(with_llm, job)
        assert len(str(raised.value).splitlines()) == 1
        assert out.read_bytes() == before

    refused(job_of(prompts, out), "exists; go on with it by --resume")
    refused(job_of(prompts, out, resume=True, top_p=0.5), r"sampling\.top_p: 1\.0 → 0\.5")
    refused(job_of(prompts, out, resume=True, seed=6), r"sampling\.seed: 5 → 6")
    other = write_lines(tmp_path / "others.jsonl", LINES[1:])
    refused(job_of(other, out, resume=True), "other prompts")
    retrained = puna.load(str(llm.source), device="cpu", dtype="float32")
    with torch.no_grad():
        retrained.model.model.norm.weight[3] += 1e-3
    refused(job_of(prompts, out, resume=True), "another model", retrained)
    (tmp_path / "out.jsonl.puna.json").unlink()
    refused(job_of(prompts, out, resume=True), "cannot be continued")


def test_a_file_of_something_else_is_left_alone(llm: LLM, tmp_path: Path) -> None:
    prompts, out = write_lines(tmp_path / "prompts.jsonl"), tmp_path / "out.jsonl"
    answer(llm, job_of(prompts, out))
    with out.open("ab") as file:
        file.write(b"notes of mine\n")
    before = out.read_bytes()
    with pytest.raises(DataError, match="line 8 is no answer"):
        answer(llm, job_of(prompts, out, resume=True))
    assert out.read_bytes() == before


def test_two_processes_do_not_write_one_file(llm: LLM, tmp_path: Path) -> None:
    prompts, out = write_lines(tmp_path / "prompts.jsonl"), tmp_path / "out.jsonl"
    with out.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunBusyError, match="another process"):
            answer(llm, job_of(prompts, out, resume=True))


def test_a_full_disk_leaves_whole_lines_to_go_on_from(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = write_lines(tmp_path / "prompts.jsonl"), tmp_path / "out.jsonl"
    pwrite, room = os.pwrite, [900]

    def filling(descriptor: int, data: bytes, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = pwrite(descriptor, data[: room[0]], offset)
        room[0] -= written
        return written

    with monkeypatch.context() as patched:
        patched.setattr(answer_files.os, "pwrite", filling)
        with pytest.raises(ResourceError, match=r"No space left.*--resume"):
            answer(llm, job_of(prompts, out))
    assert 0 < out.stat().st_size < 900
    assert out.read_bytes().endswith(b"\n")
    assert answer(llm, job_of(prompts, out, resume=True))["lines"] == 7
    answer(llm, job_of(prompts, tmp_path / "whole.jsonl"))
    assert answers_in(out) == answers_in(tmp_path / "whole.jsonl")


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_ctrl_c_keeps_what_is_answered(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException, code: int
) -> None:
    """And so does SIGTERM, which the door makes a SystemExit of."""
    prompts, out = write_lines(tmp_path / "prompts.jsonl"), tmp_path / "out.jsonl"
    put = answer_files.AnswerFile.put
    count = itertools.count(1)

    def interrupted(file: answer_files.AnswerFile, line: dict[str, Any]) -> None:
        put(file, line)
        if next(count) == 3:
            raise stop

    with monkeypatch.context() as patched:
        patched.setattr(answer_files.AnswerFile, "put", interrupted)
        with pytest.raises(Interrupted, match="--resume") as raised:
            answer(llm, job_of(prompts, out))
    assert raised.value.exit_code == code
    assert len(answers_in(out)) == 3
    assert answer(llm, job_of(prompts, out, resume=True))["lines"] == 7


def test_lines_are_taken_only_as_fast_as_they_are_answered(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x", "max_new_tokens": 2}] * 600)
    taken, ahead, done = itertools.count(), 0, 0
    latest = [0]

    def counted(name: str) -> Any:
        for line in read_prompts(name):
            latest[0] = next(taken) + 1
            yield line

    monkeypatch.setattr(generate_file, "read_prompts", counted)

    def write(line: str) -> None:
        nonlocal ahead, done
        done += 1
        ahead = max(ahead, latest[0] - done)

    answer(llm, job_of(prompts, "-"), write)
    assert done == 600
    assert ahead <= 2 * llm.engine_settings.max_running


def test_a_constraint_of_its_own_replaces_the_one_for_all(llm: LLM, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    lines: list[dict[str, Any]] = [{"prompt": "x"}, {"prompt": "x", "regex": "[0-9]{3}"}]
    prompts = write_lines(tmp_path / "prompts.jsonl", lines)
    answer(llm, job_of(prompts, tmp_path / "out", choice=["yes", "no"]))
    first, second = answers_in(tmp_path / "out")
    assert first["text"] in ("yes", "no")
    assert second["text"].isdigit()
    assert len(second["text"]) == 3


def test_progress_and_speed_are_told_on_standard_error(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl")
    generate_file.generate_file(job_of(prompts, tmp_path / "out"), lambda: llm, print, on_stderr)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tokens/s; 0 lines failed" in err
    assert "Answering: 7 lines in " in err


def test_fingerprints_tell_models_and_number_types_apart(llm: LLM) -> None:
    again = puna.load(str(llm.source), device="cpu", dtype="float32")
    assert fingerprint(again) == fingerprint(llm)
    known = dict(weights_of(llm.model))  # as they were, where it has been packed
    for name, tensor in again.model.named_parameters():
        with torch.no_grad():
            tensor.mul_(1.001)
            assert fingerprint(again) != fingerprint(llm), name
            tensor.copy_(known[name])
    assert fingerprint(puna.load(str(llm.source), device="cpu", dtype="bfloat16")) != fingerprint(llm)


def test_options_are_checked_before_a_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"type": "object"}')
    (tmp_path / "g.lark").write_text('start: "a"')
    of_file = sampling_options({}, json_schema=str(tmp_path / "s.json")).sampling["json_schema"]
    assert of_file == {"type": "object"}
    assert sampling_options({}, json_schema='{"type": "array"}').sampling["json_schema"] == {"type": "array"}
    assert sampling_options({}, json_schema="true").sampling["json_schema"] is True
    assert sampling_options({}, grammar=tmp_path / "g.lark").sampling["grammar"] == 'start: "a"'
    options = sampling_options({"top_p": 0.5}, ["typical_p=0.9", "engine.cache_dtype=int8", "stop=a b"])
    assert options.sampling == {"top_p": 0.5, "typical_p": 0.9, "stop": "a b"}
    assert options.engine.cache_dtype == "int8"
    assert sampling_options({}, ["choice=yes"]).sampling == {"choice": "yes"}
    assert sampling_options({}, ['logit_bias={"410": 5}']).sampling == {"logit_bias": {"410": 5}}
    assert parse(SamplingParams, {"choice": "yes"}) == parse(SamplingParams, {"choice": ["yes"]})
    for changes, message in (
        (["temprature=1"], "Did you mean 'temperature'"),
        (["engine.cache_dtyp=int8"], "Did you mean 'cache_dtype'"),
        (["cache_dtype=int8"], "Did you mean 'engine.cache_dtype'"),
        (["engine=3"], "engine is a table"),
        (["top_k"], "expected key=value"),
        (["top_k=-1"], "'top_k'"),
        (['logit_bias={"410": }'], "expected a table"),
    ):
        with pytest.raises(SettingsError, match=message):
            sampling_options({}, changes)
    for schema, message in (("{", "not valid JSON"), ("nowhere.json", "cannot be read")):
        with pytest.raises(SettingsError, match=message):
            sampling_options({}, json_schema=schema)


def test_several_answers_are_all_shown(llm: LLM) -> None:
    written: list[str] = []
    result = generate(llm, ["the llama"], {"n": 3, "seed": 1, "max_new_tokens": 6}, written.append, str)
    [completion] = result["completions"]
    texts = [completion["text"], *(other["text"] for other in completion["alternatives"])]
    assert len(set(texts)) == 3
    assert "".join(written) == "".join(f"the llama{text}\n{'-' * 40}\n" for text in texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --prompt TEXT"),
        (["--prompt", "x", "--prompts", "p.jsonl"], "give either --prompt TEXT"),
        (["--prompt", "x", "--out", "o.jsonl"], "--out, --resume and --template go with --prompts"),
        (["--prompt", "x", "--template", "llama3"], "--out, --resume and --template go with --prompts"),
        (["--prompt", "x", "--logprobs", "2"], "shown in JSON alone; add --json, or give --prompts"),
        (["--prompt", "x", "--set", "prompt_logprobs=2"], "shown in JSON alone; add --json"),
        (["--prompt", "x", "--set", "zzzz=2"], "unknown setting 'zzzz'. Settings here: max_new_tokens, "),
        (["--prompts", "p.jsonl", "--resume"], "--resume needs files"),
        (["--prompts", "-", "--out", "o.jsonl", "--resume"], "--resume needs files"),
        (["--prompts", "p.jsonl", "--out", "o.jsonl.gz"], "plain JSON lines"),
    ],
)
def test_mistakes_at_the_door(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from puna import cli

    monkeypatch.setattr(sys, "argv", ["puna", "generate", "nowhere", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_door_tells_failed_lines_by_its_exit_code(
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from puna import cli

    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "x"}, {"prompt": "x", "top_p": 2}])
    options = ["--prompts", str(prompts), "--max-new-tokens", "3", "--json", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["puna", "generate", str(finished[0]), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    out, err = capsys.readouterr()
    *answers, summary = map(json.loads, out.splitlines())
    assert {line["line"] for line in answers} == {1, 2}
    assert (summary["lines"], summary["failed"]) == (2, 1)
    assert err.splitlines()[-1] == "puna: 1 of 2 lines failed; their errors stand among the answers"


def test_an_input_error_of_the_model_ends_the_run_in_one_line(tmp_path: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl")

    def broken() -> LLM:
        raise InputError("no model here")

    with pytest.raises(InputError, match="no model here"):
        generate_file.generate_file(job_of(prompts, tmp_path / "out"), broken, print, silent)
    assert not (tmp_path / "out").exists()


def test_one_answer_has_the_record_that_several_have(llm: LLM) -> None:
    """Streamed, as one of many, and in a file: the same fields and values."""
    asked = {"max_new_tokens": 5, "seed": 3, "logprobs": 1, "overflow": "truncate"}
    long = "the llama " * 200
    streamed = generate(llm, [long], asked, str, str)["completions"]
    together = generate(llm, [long, "x"], asked, str, str)["completions"]
    assert streamed[0] == together[0]
    assert list(together[1]) == ["prompt", "seed", "text", "tokens", "finish_reason", "logprobs"]
    alone = llm.generate(long, **asked)
    assert alone.dropped > 0
    assert streamed == [{"prompt": long, "seed": 3, **answered(alone)}]
    assert streamed[0]["dropped"] == alone.dropped
    assert list(alone.tokens) == streamed[0]["tokens"]


def test_lost_prompt_tokens_and_cut_constraints_are_told(llm: LLM, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    long, notes = "the llama " * 200, list[str]()
    dropped = llm.generate(long, max_new_tokens=5, overflow="truncate").dropped
    lost = f"the prompt was too long; its oldest {dropped:,} tokens were left out"
    cut = "the answer was cut at 5 tokens, before it was complete; raise max_new_tokens, or bind it closer"
    asked = {"max_new_tokens": 5, "seed": 3, "overflow": "truncate"}
    generate(llm, [long], asked, str, notes.append)
    assert notes == [f"note: {lost}"]
    notes.clear()
    bound = {**asked, "regex": "[a-z]{40}"}
    generate(llm, ["x"], bound, str, notes.append)
    generate(llm, ["x", long], {**bound, "n": 2}, str, notes.append)
    cuts = [f"note: prompt 1: {cut}"] * 2
    assert notes == [
        f"note: {cut}",
        *cuts,
        f"note: prompt 2: {lost}",
        *(line.replace("1", "2") for line in cuts),
    ]
    notes.clear()
    generate(llm, ["x"], {**asked, "choice": ["yes", "no"]}, str, notes.append)
    generate(llm, ["x"], asked, str, notes.append)  # no constraint: an answer is as long as one likes
    assert notes == []
    lines = [{"prompt": "x", "regex": "[a-z]{40}"}, {"prompt": "x"}, {"prompt": long, "overflow": "truncate"}]
    result = answer(llm, job_of(write_lines(tmp_path / "p.jsonl", lines), "-", max_new_tokens=5), str)
    assert (result["shortened"], result["incomplete"], result["failed"]) == (1, 1, 0)


def test_a_resumed_run_says_what_is_there(
    llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = write_lines(tmp_path / "prompts.jsonl", [*LINES, {"prompt": 3}]), tmp_path / "out.jsonl"
    answer(llm, job_of(prompts, out))
    again = job_of(prompts, out, resume=True)
    generate_file.generate_file(again, lambda: llm, print, on_stderr)
    assert "all 8 lines are answered already, 1 of them with an error\n" in capsys.readouterr().err
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(line for line in lines[:4] if "error" not in line))
    kept = len(out.read_text().splitlines())
    generate_file.generate_file(again, lambda: llm, print, on_stderr)
    assert f"\n{kept} of 8 lines are answered already\n" in capsys.readouterr().err
    assert sorted(out.read_text().splitlines(keepends=True)) == sorted(lines)


def test_the_help_names_every_chat_template(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from puna import cli
    from puna.tokenizer.chat import TEMPLATES

    monkeypatch.setattr(sys, "argv", ["puna", "generate", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"{', '.join(TEMPLATES)}, or the text of one" in " ".join(capsys.readouterr().out.split())

"""What users hold: answers equal to transformers', to one prompt at a time, to streaming, to the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import puna
from puna import formats
from puna.engine.llm import LLM, context_length
from puna.engine.sampling import SamplingParams
from puna.errors import InputError, ModelError, PunaError, ResourceError, SettingsError, TokenizerError
from puna.formats import provenance
from puna.model.config import ModelConfig
from puna.model.llama import Llama
from puna.model.weights import weights_of
from puna.tokenizer import chat as chats
from puna.tokenizer.tokenizer import Tokenizer
from tests.engine.conftest import CONTEXT
from tests.model.shapes import CONFIGS, ids_of, model_of

PROMPTS = ["", "def parse", "import the argument\n    parser", "x", "self, *args, **kwargs) -> None:"]


def greedy_by_whole_passes(model: Llama, prompt: list[int], steps: int) -> list[int]:
    """The same without a cache: one pass over everything for every token."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "name", ["multi-head", "grouped", "tied", "attention bias", "sliding window", "llama3", "all at once"]
)
def test_greedy_equals_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name].model_copy(update={"max_position_embeddings": 64})
    model = model_of(config)
    formats.save(tmp_path / "model", weights_of(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = ids_of(config, 1, 7)

    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40, pad_token_id=0
    )
    found = LLM(model).generate(prompt[0], max_new_tokens=40, temperature=0.0)

    assert list(found.tokens) == expected[0, 7:].tolist()
    assert found.tokens == tuple(greedy_by_whole_passes(model, prompt[0].tolist(), 40))


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head", "model.layers.1.mlp.up_proj"])
def test_a_part_in_another_type_is_told_and_mended_as_told(name: str, packs: bool) -> None:
    model = model_of(CONFIGS["grouped"]).eval()
    meant = LLM(model).generate([3, 4, 5], max_new_tokens=4, temperature=0.0)
    llm = LLM(model, packs=packs)
    llm.model.get_submodule(name).to(torch.bfloat16)
    with pytest.raises(
        ModelError, match=rf"{name}\.weight is torch\.bfloat16 .* llm\.model\.to\(torch\.float32\)"
    ):
        llm.generate([3, 4, 5], max_new_tokens=4, temperature=0.0)
    llm.model.to(torch.float32)
    assert len(llm.generate([3, 4, 5], max_new_tokens=4, temperature=0.0).tokens) == len(meant.tokens)


def test_dynamic_ntk_reaches_past_its_training_length() -> None:
    model = model_of(CONFIGS["dynamic"])  # trained at 16, factor 2
    prompt = ids_of(model.config, 1, 6)[0].tolist()
    llm = LLM(model)
    assert llm.context == 32
    found = llm.generate(prompt, max_new_tokens=100, temperature=0.0)

    assert len(found.tokens) == 26
    assert found.finish_reason == "length"
    # The base is that of the length it may reach, so one pass over the whole gives the same tokens.
    whole = model(torch.tensor([prompt + list(found.tokens)]))[0, 5:-1]
    assert whole.argmax(-1).tolist() == list(found.tokens)


def test_a_batch_equals_one_at_a_time(llm: LLM) -> None:
    batch = llm.generate(PROMPTS, temperature=0.0, max_new_tokens=30, logprobs=3, ignore_eos=True)
    for prompt, together in zip(PROMPTS, batch, strict=True):
        alone = llm.generate(prompt, temperature=0.0, max_new_tokens=30, logprobs=3, ignore_eos=True)
        assert (together.text, together.tokens) == (alone.text, alone.tokens)
        assert together.prompt_tokens == alone.prompt_tokens
        for one, other in zip(together.logprobs, alone.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_seeded_answers_do_not_depend_on_the_batch(llm: LLM) -> None:
    wanted = {"seed": 7, "max_new_tokens": 25, "top_p": 0.9}
    batch = llm.generate(PROMPTS, **wanted)
    assert [answer.tokens for answer in batch] == [
        llm.generate(prompt, **wanted).tokens for prompt in PROMPTS
    ]
    assert llm.generate("x", **wanted) == llm.generate("x", **wanted)
    assert llm.generate("x", **{**wanted, "seed": 8}).tokens != llm.generate("x", **wanted).tokens


def test_rows_that_end_early_leave_the_others_unchanged(llm: LLM) -> None:
    free = llm.generate(PROMPTS, temperature=0.0, max_new_tokens=30)
    ends = tuple({answer.tokens[4 + 3 * row] for row, answer in enumerate(free)})
    llm.end_ids = ends
    answers = llm.generate(PROMPTS, temperature=0.0, max_new_tokens=30)
    assert len({len(answer.tokens) for answer in answers}) > 1
    for before, after in zip(free, answers, strict=True):
        first = min(before.tokens.index(end) for end in ends if end in before.tokens)
        assert after.tokens == before.tokens[: first + 1]
        assert after.finish_reason == "stop"


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("stop", [(), ("e",), ("in", "\ufffd\ufffd"), ("zzzz",)])
def test_pieces_of_a_stream_join_to_the_text(llm: LLM, prompt: str, stop: tuple[str, ...]) -> None:
    wanted = {"seed": 3, "max_new_tokens": 40, "temperature": 1.5, "stop": stop}
    pieces = list(llm.stream(prompt, **wanted))
    whole = llm.generate(prompt, **wanted)
    assert "".join(pieces) == whole.text
    assert all(pieces)
    assert not any(text in whole.text for text in stop)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_and_text_read_as_the_whole(llm: LLM, tokenizer: Tokenizer, prompt: str) -> None:
    answer = llm.generate(prompt, seed=1, max_new_tokens=20, ignore_eos=True)
    assert prompt + answer.text == tokenizer.decode([*answer.prompt_tokens, *answer.tokens])


def test_a_stop_string_cuts_and_ends(llm: LLM) -> None:
    free = llm.generate("def", seed=0, max_new_tokens=40, ignore_eos=True).text
    stop = free[10:13]
    cut = llm.generate("def", seed=0, max_new_tokens=40, ignore_eos=True, stop=stop)
    assert cut.text == free[: free.index(stop)]
    assert cut.finish_reason == "stop"


def test_text_gets_bos_once_and_ids_are_taken_as_they_are(llm: LLM, tokenizer: Tokenizer) -> None:
    bos = tokenizer.bos_id
    ids = llm.generate("def", max_new_tokens=1).prompt_tokens
    assert ids == (bos, *tokenizer.encode("def", bos=False))
    assert llm.generate("", max_new_tokens=1).prompt_tokens == (bos,)
    assert llm.generate([5, 6], max_new_tokens=1).prompt_tokens == (5, 6)
    assert llm.generate([bos, bos], max_new_tokens=1).prompt_tokens == (bos, bos)


def test_special_tokens_in_text_are_parsed_only_on_request(llm: LLM, tokenizer: Tokenizer) -> None:
    plain = llm.generate("</s>", max_new_tokens=1).prompt_tokens
    parsed = llm.generate("</s>", max_new_tokens=1, specials=True).prompt_tokens
    assert tokenizer.eos_id not in plain
    assert parsed == (tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple])
def test_ids_may_come_as_any_sequence(llm: LLM, kind: type) -> None:
    one = llm.generate(kind([4, 5, 6]), temperature=0.0, max_new_tokens=3)
    rows = llm.generate(kind([[4, 5, 6], [7, 8, 9]]), temperature=0.0, max_new_tokens=3)
    assert rows[0] == one
    assert len(rows) == 2


def test_any_end_token_ends_an_answer_and_has_no_text(model: Llama, tokenizer: Tokenizer) -> None:
    wanted = {"temperature": 0.0, "max_new_tokens": 30}
    free = LLM(model, tokenizer, end_ids=[]).generate("def", **wanted)
    for place in (0, 5, 9):
        end = free.tokens[place]
        first = free.tokens.index(end)
        llm = LLM(model, tokenizer, end_ids=[tokenizer.eos_id, end])
        answer = llm.generate("def", **wanted)
        assert answer.tokens == free.tokens[: first + 1]
        assert answer.finish_reason == "stop"
        assert "def" + answer.text == tokenizer.decode([*answer.prompt_tokens, *free.tokens[:first]])
        assert llm.generate("def", ignore_eos=True, **wanted).tokens == free.tokens


def test_an_answer_ends_with_the_context(llm: LLM) -> None:
    prompt = [5] * (CONTEXT - 3)
    answer = llm.generate(prompt, max_new_tokens=50, ignore_eos=True)
    assert len(answer.tokens) == 3
    assert answer.finish_reason == "length"
    with pytest.raises(InputError, match=f"{CONTEXT} tokens; this model takes {CONTEXT}"):
        llm.generate([5] * CONTEXT)


def test_logprobs_are_those_of_one_whole_pass(llm: LLM) -> None:
    answer = llm.generate("def", seed=2, max_new_tokens=12, logprobs=4, temperature=0.5, top_k=3)
    ids = torch.tensor([[*answer.prompt_tokens, *answer.tokens]])
    with torch.no_grad():
        values = llm.model(ids)[0].double().log_softmax(-1)[len(answer.prompt_tokens) - 1 : -1]
    for row, found in enumerate(answer.logprobs):
        assert found.token == answer.tokens[row]
        assert found.logprob == pytest.approx(values[row, found.token].item(), abs=1e-4)
        best = values[row].topk(4)
        assert [token for token, _ in found.top] == best.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert llm.generate("def", max_new_tokens=2).logprobs is None


def test_chat_answers_the_rendered_conversation(llm: LLM, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "parse </s> this"}]
    ids = chats.render(tokenizer, messages, "llama2")
    wanted = {"seed": 4, "max_new_tokens": 20, "ignore_eos": True}
    answer = llm.chat(messages, template="llama2", **wanted)
    assert list(answer.prompt_tokens) == ids
    assert answer.tokens == llm.generate(ids, **wanted).tokens
    assert answer.text == tokenizer.decode(answer.tokens)  # reads by itself
    assert "".join(llm.stream_chat(messages, template="llama2", **wanted)) == answer.text
    with pytest.raises(TokenizerError, match="no chat template"):
        llm.chat(messages)


def test_generation_leaves_a_model_in_training_as_it_was(llm: LLM) -> None:
    model = llm.model
    expected = llm.generate("def", temperature=0.0, max_new_tokens=8)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    random, numbers = torch.get_rng_state(), [parameter.clone() for parameter in model.parameters()]

    assert llm.generate("def", temperature=0.0, max_new_tokens=8) == expected  # no dropout
    llm.generate("def", max_new_tokens=4)
    stream = llm.stream("def", max_new_tokens=8)
    next(stream)
    assert [module.training for module in model.modules()] == modes  # between two pieces too
    stream.close()

    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, model.parameters(), numbers))
    assert torch.is_grad_enabled()
    model(torch.tensor([[1, 2, 3]])).sum().backward()  # whatever generation left behind can be trained on


def test_out_of_memory_is_told_and_the_model_restored(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    llm.model.train()
    monkeypatch.setattr(llm.model.lm_head, "forward", full)
    with pytest.raises(ResourceError, match="max_new_tokens"):
        llm.generate("def")
    assert llm.model.training


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([[]], "empty"),
        (["a", []], "empty"),
        ([-1], "-1 is not in the model's vocabulary"),
        ([3, 400], "400 is not in the model's vocabulary: expected 0 to 399"),
        (None, "text or token ids, got NoneType"),
        (7, "text or token ids, got int"),
        ([1.5], "text or token ids"),
        ("x" * 200, "shorten it"),
    ],
)
def test_bad_prompts_are_one_line(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        llm.generate(prompt)
    assert "\n" not in str(caught.value)


def test_errors_of_a_stream_come_at_once(llm: LLM) -> None:
    with pytest.raises(SettingsError, match="temperature"):
        llm.stream("x", temperature=-1)
    with pytest.raises(InputError, match="shorten it"):
        llm.stream("x" * 200)


def test_without_a_tokenizer_prompts_are_ids(model: Llama) -> None:
    llm = LLM(model, end_ids=[2])
    answer = llm.generate([5, 6], temperature=0.0, max_new_tokens=5)
    assert answer.text == ""
    assert answer.tokens == tuple(greedy_by_whole_passes(model, [5, 6], 5))
    for call in (llm.generate, llm.stream):
        with pytest.raises(InputError, match="no tokenizer"):
            call("text")
    with pytest.raises(InputError, match="no tokenizer"):
        llm.chat([{"role": "user", "content": "x"}])
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        llm.generate([5], stop="x")


def test_a_model_padded_beyond_its_tokenizer_still_answers(config: ModelConfig, tokenizer: Tokenizer) -> None:
    padded = config.model_copy(update={"vocab_size": config.vocab_size + 4000})
    answer = LLM(model_of(padded), tokenizer).generate("def", seed=0, max_new_tokens=30)
    assert max(answer.tokens) >= config.vocab_size
    assert isinstance(answer.text, str)


def test_saved_and_loaded_is_the_same(llm: LLM, tmp_path: Path) -> None:
    llm.end_ids = (*llm.end_ids, 9)
    llm.save(tmp_path / "model")
    again = puna.load(tmp_path / "model", dtype="float32", device="cpu")
    assert again.config == llm.config.model_copy(update={"rope_scaling": again.config.rope_scaling})
    assert again.end_ids == llm.end_ids
    assert again.tokenizer.fingerprint == llm.tokenizer.fingerprint
    wanted = {"seed": 5, "max_new_tokens": 20}
    assert again.generate(PROMPTS, **wanted) == llm.generate(PROMPTS, **wanted)
    assert not again.model.training
    with pytest.raises(ModelError, match=r"exists already; .* pass overwrite=True to replace it$"):
        again.save(tmp_path / "model")
    again.save(tmp_path / "copy")
    first, second = (provenance.read(tmp_path / name) for name in ("model", "copy"))
    assert (first["source"], second["source"]) == (None, str(tmp_path / "model"))
    assert first["weights"] == second["weights"]
    again.save(tmp_path / "model", overwrite=True)  # over the very files its weights are mapped from
    assert again.generate("x", **wanted) == llm.generate("x", **wanted)


def test_load_maps_the_file_and_converts_only_where_asked(llm: LLM, tmp_path: Path) -> None:
    llm.save(tmp_path / "model")
    mapped = puna.load(tmp_path / "model", dtype="float32", device="cpu")
    table = Path("/proc/self/maps")
    if table.exists():
        assert str(tmp_path / "model" / "model.safetensors") in table.read_text()
    assert {parameter.dtype for parameter in mapped.model.parameters()} == {torch.float32}
    half = puna.load(tmp_path / "model", dtype="bfloat16", device="cpu")
    for ours, theirs in zip(half.model.parameters(), llm.model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16))
    assert half.generate("x", max_new_tokens=3).tokens


def test_load_takes_another_tokenizer_and_a_run_directory(
    llm: LLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    formats.save(tmp_path / "run" / "model", weights_of(llm.model), end_ids=[9])
    (tmp_path / "run" / "run.toml").write_text("")
    tokenizer.save(tmp_path / "tokenizer")
    bare = puna.load(tmp_path / "run", dtype="float32")
    assert bare.tokenizer is None
    assert bare.end_ids == (9,)
    for given in (tmp_path / "tokenizer", str(tmp_path / "tokenizer" / "tokenizer.model"), tokenizer):
        whole = puna.load(tmp_path / "run", dtype="float32", tokenizer=given)
        assert whole.tokenizer.fingerprint == tokenizer.fingerprint
        assert whole.end_ids == (9, tokenizer.eos_id)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize": "gptq"}, "calibrated with text"),
        ({"dtype": "float31"}, "Did you mean"),
        ({"device": "gpu"}, "device must be one of"),
        ({"path": "nowhere"}, "no such file or directory"),
    ],
)
def test_load_refuses_in_one_line(llm: LLM, tmp_path: Path, arguments: dict[str, str], message: str) -> None:
    llm.save(tmp_path / "model")
    with pytest.raises(PunaError, match=message) as caught:
        puna.load(**{"path": tmp_path / "model", **arguments})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_context_is_that_of_the_config() -> None:
    assert context_length(CONFIGS["llama3"]) == 16
    assert context_length(CONFIGS["dynamic"]) == 32


def test_defaults_draw_from_the_models_own_distribution() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert (params.repetition_penalty, params.max_new_tokens, params.stop) == (1.0, 256, ())

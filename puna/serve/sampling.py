"""A request's fields → SamplingParams: OpenAI's names and defaults on one side, the engine's on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puna.engine.answer import Request
from puna.engine.params import SamplingParams
from puna.errors import SettingsError
from puna.kernels.pages import BLOCK
from puna.serve.faults import BadRequest
from puna.serve.schema import Asked, ChatRequest, CompletionRequest
from puna.serve.tools import Binding
from puna.settings import parse

# Fields that mean the same to the engine; those not given keep its defaults, which are OpenAI's too.
SAME = (
    *("n", "temperature", "presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop"),
    *("top_k", "min_p", "typical_p", "repetition_penalty", "min_new_tokens", "ignore_eos", "stop_ids"),
    *("regex", "grammar", "choice", "overflow"),
)
CONSTRAINTS = ("regex", "grammar", "choice")
CUTS = ("stop", "stop_ids", "ignore_eos")
COMPLETION_TOKENS = 16  # OpenAI's default for completions
MOST_ENTRIES = 4_000_000  # log-probabilities of one request: 0.6 GB while they come, 2 GB once they are JSON
SEEDS = 2**63
LEAST_TOP_P = (
    1e-9  # the engine wants a share above 0; so small a one leaves the likeliest token, which 0 means
)


def chat_params(asked: ChatRequest, binding: Binding, room: int, stop: Sequence[str] = ()) -> SamplingParams:
    """For an answer in a conversation; `room` is the longest there can be, `stop` what ends it besides.

    Raises:
        BadRequest: the request's fields contradict each other.
    """
    _check_binding(asked, binding)
    if asked.logprobs:
        each = (asked.n or 1) * ((asked.top_logprobs or 0) + 1)
        room = min(room, MOST_ENTRIES // each)
    limit = asked.max_completion_tokens or asked.max_tokens or room
    fields = {**_common(asked, limit), **binding.fields}
    if asked.logprobs:
        fields["logprobs"] = asked.top_logprobs or 0
    if binding.ends:
        fields.pop("stop", None)  # the grammar has them, for answers that are no calls
    elif stop and binding.param is None:
        fields["stop"] = [*fields.get("stop", ()), *stop]
    return _parsed(fields)


def completion_params(asked: CompletionRequest, binding: Binding) -> SamplingParams:
    """For a completion. Where no tokens are asked for, one is made and left out of the response.

    Raises:
        BadRequest: the request's fields contradict each other.
    """
    _check_binding(asked, binding)
    limit = COMPLETION_TOKENS if asked.max_tokens is None else max(asked.max_tokens, 1)
    fields = {**_common(asked, limit), **binding.fields, "logprobs": asked.logprobs}
    if asked.best_of is not None:
        fields["best_of"] = asked.best_of
    if asked.echo:
        fields["prompt_logprobs"] = asked.logprobs
    return _parsed(fields)


def check_entries(asked: Asked, requests: Sequence[Request], context: int) -> None:
    """Whether the log-probabilities that requests made of it may come to hold are not too many.

    Raises:
        BadRequest: they are.
    """
    params = requests[0].params
    if params.logprobs is None:
        return
    longest = params.max_new_tokens if params.overflow == "slide" else min(params.max_new_tokens, context)
    echoed = sum(len(request.prompt) for request in requests) if params.prompt_logprobs is not None else 0
    count = (len(requests) * params.answers * longest + echoed) * (params.logprobs + 1)
    if count > MOST_ENTRIES:
        name = "top_logprobs" if isinstance(asked, ChatRequest) and params.logprobs else "logprobs"
        raise BadRequest(
            f"the answers may come to {count:,} log-probabilities, and {MOST_ENTRIES:,} are given at most; "
            f"lower n, max_tokens or {name}",
            name,
        )


def stops_of(asked: Asked) -> list[str]:
    """The texts that a request says end its answer."""
    return [asked.stop] if isinstance(asked.stop, str) else list(asked.stop or ())


def room_after(tokens: int, context: int, blocks: int) -> int:
    """The longest answer to a prompt of so many tokens: what is left of the context, and of the cache."""
    longest = min(context, blocks * BLOCK)
    return longest - tokens if tokens < longest else max(longest // 2, 1)  # the prompt is cut, or refused


def _common(asked: Asked, limit: int) -> dict[str, Any]:
    """`limit` is the longest answer, in tokens."""
    fields = {name: value for name in SAME if (value := getattr(asked, name)) is not None}
    fields |= {"stop": stops_of(asked), "max_new_tokens": limit, "top_k": max(asked.top_k or 0, 0)}
    if asked.seed is not None:
        fields["seed"] = asked.seed % SEEDS
    if fields.get("min_new_tokens", 0) > limit:
        raise BadRequest(
            f"min_new_tokens {asked.min_new_tokens} is above the longest answer, of {limit} tokens; "
            "lower it, or raise max_tokens",
            "min_new_tokens",
        )
    if asked.top_p is not None:
        fields["top_p"] = max(asked.top_p, LEAST_TOP_P)
    return fields


def _check_binding(asked: Asked, binding: Binding) -> None:
    if binding.param is None:
        return
    cuts = [name for name in CUTS if name != "stop" or not binding.ends]
    others = [name for name in (*CONSTRAINTS, *cuts) if name != binding.param]
    against = next((name for name in others if getattr(asked, name)), None)
    if against is not None:
        raise BadRequest(
            f"{binding.param} and {against} contradict each other: what {binding.param} binds ends where "
            f"it is complete, and is held to nothing else; leave {against} out",
            against,
        )


def _parsed(fields: Mapping[str, Any]) -> SamplingParams:
    try:
        return parse(SamplingParams, fields, "the request")
    except SettingsError as error:
        text = str(error).removeprefix("the request: ")
        name = text.partition(":")[0].strip("'")
        raise BadRequest(text, name if name in SAME else None) from None

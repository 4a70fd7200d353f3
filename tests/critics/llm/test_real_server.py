"""The judge's client against a server that is not ours: ``transformers serve`` with a tiny random model."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("litellm")  # and what comes with it

from critics.llm.real_server import save_judge, serve

from ssrctl.configs import CriticOptions
from ssrctl.critics.llm.client import CallTag, JudgeClient
from ssrctl.critics.llm.failures import CallFailed
from ssrctl.critics.llm.meter import Meter, Prices
from ssrctl.critics.llm.pacing import Pacer
from ssrctl.critics.llm.verdicts import Verdicts
from ssrctl.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def judge(tmp_path_factory, bpe_tokenizer):
    folder = save_judge(tmp_path_factory.mktemp("judge"), bpe_tokenizer)
    with serve(folder) as base_url:
        yield f"openai/{folder}", base_url


def ask(judge, texts, model=None):
    """The replies to ``texts``, asked at once; failures as they are."""
    name, base_url = judge
    options = CriticOptions(
        critic="llm", critic_model=model or name, critic_api_base=base_url, critic_timeout=120.0, critic_retries=0
    )
    meter, calls = Meter(1.0, Prices(1e-6, 1e-6)), []

    async def main():
        client = JudgeClient(options, Pacer(None), meter, calls.append, schema=Verdicts)
        try:
            asked = [
                client.ask(
                    [{"role": "system", "content": "You grade."}, {"role": "user", "content": text}],
                    max_reply_tokens=16,
                    tag=CallTag(text),
                )
                for text in texts
            ]
            return await asyncio.gather(*asked, return_exceptions=True)
        finally:
            await client.close()

    return asyncio.run(main()), meter, calls


def test_questions_are_answered_and_counted(judge, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)  # a server of one's own asks for none
    texts = [f"Step {number}: 12+30=42 \ud800 ½" for number in range(6)]
    replies, meter, calls = ask(judge, texts)
    assert all(reply.text and reply.model == judge[0] for reply in replies)
    assert all(reply.completion_tokens == 16 for reply in replies)
    assert all(
        0 < reply.prompt_tokens <= len(text.encode(errors="replace")) + 60
        for reply, text in zip(replies, texts, strict=True)
    )
    assert len(calls) == 6 and meter.reserved_usd == 0
    assert meter.spent_usd == pytest.approx(sum(r.prompt_tokens + 16 for r in replies) * 1e-6)
    again, *_ = ask(judge, texts[:1])
    assert again[0].text == replies[0].text  # temperature 0


def test_another_model_is_not_there(judge):
    (failed,), meter, calls = ask(judge, ["foo"], model="openai/no-such-model")
    assert isinstance(failed, CallFailed | UserError) and "no-such-model" in str(failed)
    # with a form for the reply, which a server may refuse in this way, and without one
    assert [call.error for call in calls] == ["bad_request"] * 2 and meter.spent_usd == 0

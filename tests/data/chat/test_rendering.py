"""Behaviour: a chat template that loops for ever or builds gigabytes is stopped, and named; Exact: the others' text."""

import pytest

from onecard.config import DataConfig
from onecard.data.chat import rendering
from onecard.data.chat.mask import prompt_ids
from onecard.data.chat.rendering import Renderings, Sandbox
from onecard.data.load import load_dataset
from onecard.errors import UserError
from tests.conftest import chat_rows, make_tokenizer, write_rows
from tests.data.chat.test_mask import TEMPLATES
from tests.data.test_turns import QWEN3

ASKED = [{"role": "user", "content": "how many?"}]
LONG = "range(99999)"
TOO_LONG = {
    "nested loops": f"{{% for a in {LONG} %}}{{% for b in {LONG} %}}{{% endfor %}}{{% endfor %}}",
    "a power": "{{ (7 ** (10 ** 9)) % 2 }}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
}
TOO_MUCH = {
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "a text": "{{ 'a' * 10**10 }}",
    "a text while it is compiled": "{{ ('a' * 10**10) | length }}",
    "a format": "{{ '%0999999999d' % 1 }}",
    "filling up": "{{ 'a'.ljust(10**10) }}",
    "centring": "{{ 'a' | center(10**10) }}",
    "doubling": "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "many lines": f"{{% for a in {LONG} %}}{{{{ 'a' * 1000 }}}}{{% endfor %}}",
}


@pytest.fixture
def sandbox(monkeypatch):
    monkeypatch.setattr(rendering, "MAX_SECONDS", 1)
    monkeypatch.setattr(rendering, "sandbox", own := Sandbox())
    yield own
    own.stop()


def refused(template):
    tokenizer = make_tokenizer(template)
    tokenizer.name_or_path = "some/checkpoint"
    with pytest.raises(UserError) as error:
        prompt_ids(ASKED, tokenizer)
    assert error.value.where == "the chat template of some/checkpoint"
    return error.value.found


@pytest.mark.parametrize(
    "name", [name if name == "a power" else pytest.param(name, marks=pytest.mark.slow) for name in TOO_LONG]
)
def test_a_template_that_runs_too_long_is_stopped(name, sandbox):
    """A power of integers is one call that no signal handler and no other thread could interrupt."""
    assert refused(TOO_LONG[name]) == "it runs for more than 1 s"
    assert prompt_ids(ASKED, make_tokenizer())  # a new process answers


def test_a_template_that_takes_too_much_is_stopped(sandbox, monkeypatch):
    monkeypatch.setattr(rendering, "MAX_SECONDS", 60)  # memory is short first, on a busy machine too
    for name, template in TOO_MUCH.items():
        found = refused(template)
        assert any(said in found for said in ("too much memory", "characters", "Range too big")), (name, found)


def test_recursion_without_an_end_is_refused():
    tokenizer = make_tokenizer("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    with pytest.raises(UserError, match=r"chat template of .* must accept.*\n.*recursion"):
        prompt_ids(ASKED, tokenizer)


def test_a_bad_template_ends_the_reading_of_data_at_once(sandbox, tmp_path):
    """It is not a bad row: each would cost its seconds."""
    bomb = "{% if messages | length > 1 %}{{ 'a' * 10**10 }}{% endif %}"
    path = write_rows(tmp_path / "d.jsonl", chat_rows(3))
    with pytest.raises(UserError, match="in bounds"):
        load_dataset(str(path), make_tokenizer(bomb), DataConfig(on_bad_rows="skip"))


def test_renderings_are_those_of_apply_chat_template():
    chat = [
        *ASKED,
        {"role": "assistant", "content": "two é\u2028 \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")},
    ]
    for template, specials, _ in [*TEMPLATES.values(), (QWEN3, (), "")]:
        tokenizer = make_tokenizer(template, specials)
        made = Renderings(chat, tokenizer, "here", wanted=[(1, True)])
        assert made.text(2) == tokenizer.apply_chat_template(chat, tokenize=False)
        assert made.text(1, True) == tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)


def test_a_process_that_dies_is_started_again(sandbox):
    tokenizer = make_tokenizer()
    ids = prompt_ids(ASKED, tokenizer)
    sandbox.process.kill()
    sandbox.process.wait()
    assert prompt_ids(ASKED, tokenizer) == ids

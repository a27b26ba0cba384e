"""Messages become the text that the model was trained on."""

import datetime

import pytest

from octavo.engine.text.template import ChatTemplate, TemplateError, load_template

USER = [{"role": "user", "content": "Hi"}]
PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_smollm2s_own_template_gives_its_system_prompt(smollm2):
    text = load_template(smollm2).render(USER)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_a_model_without_a_template_says_what_to_do(gemma3, smollm2):
    with pytest.raises(TemplateError) as error:
        load_template(gemma3)
    assert str(error.value) == (
        "the model has no chat template; use completions or pass --chat-template"
    )
    assert load_template(gemma3, PLAIN).render(USER) == "<user>Hi</>\n<assistant>"


def test_a_template_file_can_be_given(tmp_path, smollm2):
    (tmp_path / "t.jinja").write_text(PLAIN)
    assert load_template(smollm2, tmp_path / "t.jinja").render(USER).startswith("<user>")
    with pytest.raises(TemplateError, match="cannot be read"):
        load_template(smollm2, tmp_path / "none.jinja")


def test_the_last_message_can_be_left_open():
    messages = [*USER, {"role": "assistant", "content": "Sure: "}]
    text = ChatTemplate(PLAIN).render(messages, continue_final_message=True)
    assert text == "<user>Hi</>\n<assistant>Sure: "
    with pytest.raises(TemplateError, match="needs text in the last message"):
        ChatTemplate(PLAIN).render(
            [{"role": "assistant", "content": ""}], continue_final_message=True
        )


def test_content_parts_become_what_the_template_wants():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]
    assert "<user>a\nb</>" in ChatTemplate(PLAIN).render(parts)
    loops = (
        "{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}{% endfor %}"
    )
    assert ChatTemplate(loops).render(parts) == "[a][b]"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]
    with pytest.raises(TemplateError, match="type `image_url` cannot be read"):
        ChatTemplate(PLAIN).render(image)


def test_templates_find_the_names_they_expect():
    source = (
        "{{ bos_token }}{% generation %}{{ tools | tojson }}{% endgeneration %}"
        "{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}"
        "{{ strftime_now('%Y') }}{{ enable_thinking }}"
    )
    text = ChatTemplate(source, {"bos_token": "<s>"}).render(
        USER, tools=[{"name": "é<"}], enable_thinking=False
    )
    assert text == f'<s>[{{"name": "é<"}}]1{datetime.datetime.now():%Y}False'


def test_refusals_and_mistakes_are_one_sentence():
    with pytest.raises(TemplateError, match="refuses these messages: no system role"):
        ChatTemplate("{{ raise_exception('no system role') }}").render(USER)
    with pytest.raises(TemplateError, match="not valid Jinja .*line 2"):
        ChatTemplate("a\n{% if %}")
    with pytest.raises(TemplateError, match="`messages` must not be empty"):
        ChatTemplate(PLAIN).render([])


def test_a_template_cannot_leave_its_sandbox():
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ):
        with pytest.raises(TemplateError, match="refuses"):
            ChatTemplate(source).render(USER)

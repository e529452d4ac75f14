"""Chat templates in the shape of real families, and where a message is in their prompts."""

from dataclasses import dataclass, field

import llama_cpp
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llama_cpp import llama_chat_format

DEEPSEEK_USER, DEEPSEEK_ASSISTANT = "<｜User｜>", "<｜Assistant｜>"  # noqa: RUF001


@dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
        source: Jinja.
        control: the tokens that it writes, beyond those that all tiny models have.
        system: True if it has system messages.
        parts: True if it renders a content of parts.
    """

    source: str
    control: list[str] = field(default_factory=list)
    system: bool = True
    parts: bool = False


_GENERATE = "{% if add_generation_prompt %}"

TEMPLATES = {
    # llama-cpp-python recognises these three and replaces them by its own formatters.
    "chatml": Template(llama_chat_format.CHATML_CHAT_TEMPLATE),
    "llama-3": Template(
        llama_chat_format.LLAMA3_INSTRUCT_CHAT_TEMPLATE,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "mistral": Template(llama_chat_format.MISTRAL_INSTRUCT_CHAT_TEMPLATE, system=False),
    "llama-2": Template(
        "{% if messages[0].role == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set turns = messages[1:] %}"
        "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim }}"
        "{{ ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": Template(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        + _GENERATE
        + "{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "phi-3": Template(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        + _GENERATE
        + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    ),
    "zephyr": Template(
        "{% for m in messages %}\n{% if m.role == 'user' %}"
        "\n{{ '<|user|>\n' + m.content + eos_token }}"
        "\n{% elif m.role == 'system' %}\n{{ '<|system|>\n' + m.content + eos_token }}"
        "\n{% else %}\n{{ '<|assistant|>\n' + m.content + eos_token }}\n{% endif %}"
        "\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}"
        "\n{% endfor %}"
    ),
    "command-r": Template(
        "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + "
        "{'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m.role] + '_TOKEN|>' + "
        "m.content | trim + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        + _GENERATE
        + "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        [
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ],
    ),
    "deepseek-llm": Template(  # all of it plain text, which the tokenizer may join to a message
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ 'User: ' + m.content + '\n\n' }}{% elif m.role == 'assistant' %}"
        "{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\n\n' }}{% endif %}"
        "{% endfor %}" + _GENERATE + "{{ 'Assistant:' }}{% endif %}"
    ),
    "deepseek-r1": Template(
        "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '" + DEEPSEEK_USER + "' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '" + DEEPSEEK_ASSISTANT + "' + m.content + eos_token }}"
        "{% endif %}{% endfor %}"
        + _GENERATE
        + "{{ '"
        + DEEPSEEK_ASSISTANT
        + "<think>\n' }}{% endif %}",
        [DEEPSEEK_USER, DEEPSEEK_ASSISTANT],
    ),
    "smollm2": Template(
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant, and the user asks<|im_end|>\n' }}"
        "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}" + _GENERATE + "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "alpaca": Template(  # repeats the message's surroundings
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '### Instruction:\n' + m.content + '\n\n' }}"
        "{% elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + '\n\n' }}"
        "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
        + _GENERATE
        + "{{ '### Response:\n' }}{% endif %}"
    ),
    "vision": Template(  # Gemma 3, SmolVLM: a content is a text or parts
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\n' }}"
        "{% if m.content is string %}{{ m.content | trim }}{% else %}"
        "{% for part in m.content %}{% if part.type == 'image' %}{{ '<image>' }}"
        "{% elif part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}"
        "{{ '<end_of_turn>\n' }}{% endfor %}"
        + _GENERATE
        + "{{ '<start_of_turn>assistant\n' }}{% endif %}",
        ["<start_of_turn>", "<end_of_turn>", "<image>"],
        parts=True,
    ),
}


def rendered(llm, source, messages):
    """The text of a prompt, by Jinja alone; `llm` is asked for the texts of two tokens."""
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    bos, eos = (
        llama_cpp.llama_vocab_get_text(vocab, token).decode()
        for token in (llm.token_bos(), llm.token_eos())
    )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    return environment.from_string(source).render(
        messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
    )


def pieces_of(llm, tokens):
    """The text of each token, as bytes, however long."""
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    buffer = (llama_cpp.ctypes.c_char * 1024)()
    found = []
    for token in tokens:
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, 1024, 0, True)
        found.append(bytes(buffer[:n]))
    return found


def message_tokens(llm, source, messages, marked):
    """The prompt's tokens, and which of them are the last user message, by offsets into its text.

    They are the tokens that hold a character of the message, and, where the message changes how the
    tokenizer splits what is around it, the tokens next to them from the first such change on. All
    tokens if the message is empty or not rendered.

    Args:
        llm: the model, for its vocabulary.
        source: the template.
        messages: a conversation.
        marked: a function from a text to the same conversation with another last user message.
    """
    text = rendered(llm, source, messages)
    tokens = tokens_of(llm, text)
    head, _, tail = rendered(llm, source, marked("\ue000")).partition("\ue000")
    assert text.startswith(head)
    assert text.endswith(tail)
    if len(text) == len(head) + len(tail):  # the message is empty, or has no text at all
        return tokens, (0, len(tokens))
    neutral = tokens_of(llm, f"{head}0{tail}")
    start = _n_outside(llm, tokens, neutral, head)
    stop = len(tokens) - _n_outside(llm, tokens[::-1], neutral[::-1], tail[::-1])
    return tokens, (start, stop)


def tokens_of(llm, text):
    """The tokens of a prompt's text."""
    return tuple(llm.tokenize(text.encode(), add_bos=False, special=True))


def _n_outside(llm, tokens, neutral, text):
    """Number of first tokens that `text` and `neutral` have in common."""
    n, length = 0, len(text.encode())
    for token, expected, piece in zip(tokens, neutral, pieces_of(llm, tokens), strict=False):
        length -= len(piece)
        if length < 0 or token != expected:
            break
        n += 1
    return n

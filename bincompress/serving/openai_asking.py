"""What does a request in OpenAI's form ask? Every parameter is understood, says what happens anyway, or is refused."""

from typing import Any

from bincompress.errors import BincompressError
from bincompress.inference.messages import messages_of
from bincompress.inference.offered_tools import Tools, tools_of
from bincompress.inference.request_fields import Fields, shown
from bincompress.inference.response_format import response_format
from bincompress.serving.asking import (
    Asked,
    check_model,
    choices_of,
    lengths_of,
    request_for,
    sampling_of,
    seeded,
    stops_of,
)
from bincompress.serving.reading import RequestError
from bincompress.serving.service import Service
from bincompress.serving.texts import refused

_SHOWN = 60  # characters of a name in a message
_RESERVED = ("self", "messages", "tools", "xml_tools", "documents", "add_generation_prompt")
_USUAL_LENGTH = 16  # of OpenAI's completions
MOST_ALTERNATIVES = 20


def completion(fields: Fields, service: Service) -> Asked:
    """Return what a request to /v1/completions asks; tokenizes its prompts."""
    check_model(fields, service)
    prompts = texts_of(fields, service)
    common = _Common(fields, service, len(prompts))
    logprobs = fields.number("logprobs", 0, MOST_ALTERNATIVES, whole=True)
    echo = bool(fields.take("echo", bool))
    most = lengths_of(fields, "max_tokens", least=0)
    if most == 0 and not echo:
        fields.refuse("max_tokens", "0 tokens are written only with echo; expected at least 1")
    fields.neutral("suffix")
    fields.neutral("best_of", common.choices)
    fields.finish()
    made = []
    for ids, _ in prompts:
        request = request_for(
            service, ids, common.sampling, common.stop, _USUAL_LENGTH if most is None else most,
            logprobs=logprobs, prompt_logprobs=echo and logprobs is not None,
        )  # fmt: skip
        made += [seeded(request, choice) for choice in range(common.choices)]
    texts = [text for _, text in prompts]
    return Asked(made, common.choices, common.stream, common.include_usage, echo, logprobs, texts)


def chat(fields: Fields, service: Service) -> Asked:
    """Return what a request to /v1/chat/completions asks; renders the template."""
    check_model(fields, service)
    messages = messages_of(fields, service.model.template)
    common = _Common(fields, service, 1)
    tools = tools_of(fields, service.model)
    wanted, alternatives = (
        fields.take("logprobs", bool),
        fields.number("top_logprobs", 0, MOST_ALTERNATIVES, whole=True),
    )
    if alternatives is not None and not wanted:
        fields.refuse("top_logprobs", "expected logprobs to be true as well")
    most = lengths_of(fields, "max_completion_tokens", "max_tokens")
    variables = variables_of(fields, service, tools is not None)
    form = response_format(fields)
    if form is not None and tools is not None:
        fields.refuse("response_format", "a form and tools cannot be asked for together; expected one of the two")
    # What says that nothing of the kind is wanted is as good as nothing.
    fields.neutral("modalities", ["text"])
    fields.neutral("store", False)
    fields.neutral("service_tier", "auto", "default")
    fields.finish()
    ids = rendered(service, messages, variables, tools)
    logprobs = (alternatives or 0) if wanted else None
    marks = frozenset() if tools is None else tools.marks
    request = request_for(service, ids, common.sampling, common.stop, most, logprobs=logprobs, shown=marks)
    made = [seeded(request, choice) for choice in range(common.choices)]
    return Asked(made, common.choices, common.stream, common.include_usage, logprobs=logprobs,
                 form=form if tools is None else tools.grammar, tools=tools)  # fmt: skip


def rendered(
    service: Service, messages: list[dict[str, Any]], variables: dict[str, Any], tools: Tools | None = None
) -> list[int]:
    """Return the tokens of a conversation, by the model's own template."""
    template = service.model.template
    if template is None:
        raise RequestError(400, "the model has no chat template; use /v1/completions", "messages")
    try:
        text = template.render(messages, None if tools is None else tools.given, **variables)
        return service.model.tokenizer.encode(text, special=False)
    except BincompressError as error:
        raise refused(error) from error


def variables_of(fields: Fields, service: Service, tools: bool = False) -> dict[str, Any]:
    """Return the variables that a request sets for the template; tools: the one for conversations with tools."""
    variables: dict[str, Any] = fields.take("chat_template_kwargs", dict) or {}
    template = service.model.template
    for name in variables:
        if name in _RESERVED:
            fields.refuse("chat_template_kwargs", f"{name} is not a variable that a request may set")
        try:
            used = template is None or template.takes(name, tools)
        except BincompressError as error:
            raise refused(error) from error
        if not used:
            fields.refuse("chat_template_kwargs", f"this model's chat template does not use {name[:_SHOWN]!r}")
    return variables


class _Common:
    """What both kinds of request ask alike."""

    def __init__(self, fields: Fields, service: Service, prompts: int) -> None:
        self.sampling = sampling_of(fields, service.model.defaults.sampling)
        self.stop = stops_of(fields)
        self.choices = choices_of(fields, service, prompts)
        self.stream = bool(fields.take("stream", bool))
        options = Fields(fields.take("stream_options", dict) or {}, "stream_options.")
        self.include_usage = bool(options.take("include_usage", bool))
        options.neutral("include_obfuscation", False)
        options.finish()
        if self.include_usage and not self.stream:
            fields.refuse("stream_options", "expected stream to be true as well")
        fields.take("user", str)  # says who asks, and changes nothing by its definition


def texts_of(fields: Fields, service: Service, name: str = "prompt") -> list[tuple[list[int], str]]:
    """Return the tokens and the text of each that a field holds: a text, tokens, or a list of either."""
    given = fields.take(name, str, list)
    if given is None or given == []:
        fields.refuse(name, "expected a text, a list of texts, or tokens")
    several = given if isinstance(given, list) and not all(type(each) is int for each in given) else [given]
    if len(several) > service.settings.most_choices:
        fields.refuse(name, f"expected at most {service.settings.most_choices} texts, found {len(several):,}")
    return [_text(fields, service, name, each) for each in several]


def _text(fields: Fields, service: Service, name: str, given: Any) -> tuple[list[int], str]:
    model = service.model
    try:
        if isinstance(given, str):
            ids = model.tokenizer.encode(given)
            if not ids and model.tokenizer.bos_id is not None:
                ids = [model.tokenizer.bos_id]
            return ids, given
        if not isinstance(given, list) or not all(type(token) is int for token in given):
            fields.refuse(name, f"expected texts or lists of tokens, found {shown(given)}")
        if any(not 0 <= token < model.decoder.config.vocab for token in given):
            fields.refuse(name, f"expected tokens of the vocabulary, 0 to {model.decoder.config.vocab - 1}")
        return list(given), model.tokenizer.decode(given, skip_special=False)
    except BincompressError as error:
        raise refused(error) from error

"""Tokens of texts and texts of tokens, and what a client has to know that counts tokens by these."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bincompress.inference.messages import messages_of
from bincompress.inference.request_fields import Fields
from bincompress.serving.asking import check_model
from bincompress.serving.bodies import in_thread, read_json
from bincompress.serving.openai_asking import rendered, variables_of
from bincompress.serving.service import Service
from bincompress.serving.texts import of_request


async def tokenize(request: Request) -> Response:
    """Return the tokens of a text, or of a conversation by the model's template."""
    service: Service = of_request(request)
    service.ready()
    fields = await read_json(request, service)
    ids = await in_thread(service, _tokens, fields, service)
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.ready().limits.context})


def _tokens(fields: Fields, service: Service) -> list[int]:
    check_model(fields, service)
    if fields.given("messages"):
        found = rendered(service, messages_of(fields, service.model.template), variables_of(fields, service))
    else:
        prompt, special = fields.take("prompt", str), fields.take("add_special_tokens", bool)
        if prompt is None:
            fields.refuse("prompt", "expected a text, or messages")
        found = service.model.tokenizer.encode(prompt, special=special is not False)
    fields.finish()
    return found


async def detokenize(request: Request) -> Response:
    """Return the text of tokens."""
    service: Service = of_request(request)
    vocab = service.model.decoder.config.vocab
    fields = await read_json(request, service)
    check_model(fields, service)
    ids = fields.take("tokens", list)
    fields.finish()
    if ids is None or not all(type(token) is int and 0 <= token < vocab for token in ids):
        fields.refuse("tokens", f"expected a list of tokens, 0 to {vocab - 1}")
    return JSONResponse({"prompt": await in_thread(service, service.model.tokenizer.decode, ids, False)})


async def tokenizer_info(request: Request) -> Response:
    """Return the special tokens' texts and the chat template, null where there is none, in the form of vLLM.

    lm_eval's local-completions asks for it, where it is given no tokenizer of its own.
    """
    service: Service = of_request(request)
    model = service.model
    template, tokenizer = model.template, model.tokenizer
    named = {} if template is None else template.variables
    ends = [tokenizer.text_of(token) for token in sorted(tokenizer.eos_ids)]
    begin = None if tokenizer.bos_id is None else tokenizer.text_of(tokenizer.bos_id)
    return JSONResponse(
        {
            "eos_token": named.get("eos_token") or next(iter(ends), None),
            "bos_token": named.get("bos_token") or begin,
            "pad_token": named.get("pad_token"),
            "chat_template": None if template is None else template.source,
        }
    )

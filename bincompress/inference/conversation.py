"""A chat within a model's context: when it grows too long, its oldest turns are left out."""

from bincompress.inference.generate import Generation, GenerationSettings, Model, TooLongError
from bincompress.inference.prefixes import PrefixCache
from bincompress.model.cache import cache_bytes

_ROOM_SHARE = 4  # of the context, one part is kept free for the answer


class Conversation:
    """Questions and answers so far, and how many of the oldest the model no longer sees."""

    def __init__(self, model: Model, settings: GenerationSettings, system: str | None = None) -> None:
        self._model = model
        self._settings = settings
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []  # a question and its answer, in turn
        self._asked: dict[str, str] = {}
        self.left_out = 0  # turns
        self.context = min(settings.context or model.decoder.config.context, model.decoder.config.context)
        room = self.context // _ROOM_SHARE
        self._room = min(settings.max_tokens or room, room)
        # One cache, which every turn goes on with: only what is new of a conversation is computed.
        most = cache_bytes(model.decoder.config, self.context, settings.cache)
        self.prefixes = PrefixCache(model.decoder, self.context, settings.cache, most)

    def ask(self, question: str) -> Generation:
        """Return the generation of an answer; raises PromptError where the question cannot be asked, even alone."""
        asked = {"role": "user", "content": question}
        turns = self._turns
        while True:
            try:
                answer = self._model.chat([*self._system, *turns, asked], self._settings, prefixes=self.prefixes)
                if answer.limit >= self._room or not turns:
                    break
            except TooLongError:
                if not turns:
                    raise
            turns = turns[2:]
        self.left_out += (len(self._turns) - len(turns)) // 2
        self._turns, self._asked = turns, asked
        return answer

    def answered(self, text: str) -> None:
        """Remember the answer, as far as it came; a question without any is forgotten."""
        if text:
            self._turns = [*self._turns, self._asked, {"role": "assistant", "content": text}]

"""From token ids, a few at a time, to text that can be shown."""

import codecs


class TextStream:
    """Turns token ids into text as they come.

    Nothing is shown that later tokens could change: an unfinished UTF-8
    character waits for its last byte, and text that may be the start of a
    stop string waits until it is known. Ids beyond the tokenizer's vocabulary,
    which a model may have to spare, have no text.

    Args:
        tokenizer: `BwETAFTokenizer`.
        stop_strings: list of str. The text ends before the one that is
            complete first.
        stop_token_ids: list of int. Tokens that are not part of the text.

    Attributes:
        stopped: bool. Whether a stop string was met.
    """

    def __init__(self, tokenizer, stop_strings, stop_token_ids):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._stop_token_ids = stop_token_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token_ids, final=False):
        """Takes new tokens and returns the text that is now certain.

        Args:
            token_ids: list of int.
            final: bool. Whether no more tokens will follow.

        Returns:
            str, possibly empty.
        """
        if self.stopped:
            return ""
        vocabulary_size = self._tokenizer.vocabulary_size()
        new_bytes = self._tokenizer.token_bytes(
            [
                i
                for i in token_ids
                if i < vocabulary_size and i not in self._stop_token_ids
            ]
        )
        text = self._held + self._decoder.decode(new_bytes, final)
        found = [(text.find(stop), stop) for stop in self._stop_strings]
        found = [(i + len(stop), i) for i, stop in found if i >= 0]
        if found:
            self.stopped = True
            _, start = min(found)  # the one that is complete first
            return text[:start]
        num_held = 0 if final else self._overlap_with_stop(text)
        shown = len(text) - num_held
        self._held = text[shown:]
        return text[:shown]

    def _overlap_with_stop(self, text):
        """Length of the longest end of `text` that may begin a stop string."""
        return max(
            (
                size
                for stop in self._stop_strings
                for size in range(1, len(stop))
                if text.endswith(stop[:size])
            ),
            default=0,
        )

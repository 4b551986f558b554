"""From a task to token ids and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zerokl.orchestrate.data import Task
from zerokl.orchestrate.errors import UserError


class Tokenizer:
    """The model folder's tokenizer. A folder without one serves prompts given as `input_ids`."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder, self.vocab_size = folder, vocab_size
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            if not self.exists:
                raise UserError(f"{self.folder} has no tokenizer", "give prompts as input_ids, or add the tokenizer")
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        return self._tokenizer

    @property
    def end(self) -> tuple[int, ...]:
        """The tokens that end a response."""
        return (self.tokenizer.eos_token_id,) if self.exists else ()

    @property
    def exists(self) -> bool:
        """Whether the model folder holds a tokenizer."""
        return (self.folder / "tokenizer_config.json").is_file()

    def encode(self, task: Task, *, template: str | None, longest: int) -> tuple[int, ...]:
        """Token ids of the task's prompt.

        `template` "chat": text becomes one user message of the tokenizer's chat template; None: text is taken as it
        is; else the text of `str.format` over `prompt` and the task's fields. Chat messages always use the tokenizer's
        template. Raises UserError for more than `longest` tokens or ids outside the vocabulary.
        """
        ids = task.input_ids if task.input_ids is not None else tuple(self._encode(task, template))
        if not ids:
            raise UserError(f"{task.name}: the prompt has no tokens", "write a longer prompt")
        if len(ids) > longest:
            raise UserError(f"{task.name}: the prompt has {len(ids)} tokens, at most {longest} fit", "shorten it")
        if max(ids) >= self.vocab_size:
            raise UserError(f"{task.name}: token {max(ids)} is outside the vocabulary of {self.vocab_size}")
        return ids

    def decode(self, ids: tuple[int, ...]) -> str:
        """The text of a response, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _encode(self, task: Task, template: str | None) -> list[int]:
        prompt: Any = task.prompt
        if isinstance(prompt, str) and template == "chat":
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, str):
            if not self.tokenizer.chat_template:
                raise UserError(f"{self.folder} has no chat template", "give prompts as text, or set data.template")
            return self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        if template is not None:
            try:
                prompt = template.format(**{**task.fields, "prompt": prompt})
            except (KeyError, IndexError, ValueError) as error:
                known = ", ".join(["prompt", *sorted(task.fields)])
                raise UserError(f"data.template fails with {error!r}", f"fields of this task: {known}") from error
        return self.tokenizer(prompt)["input_ids"]

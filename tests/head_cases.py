"""Sequences with heads of many sizes over a few steps: what the device drafts, and what HeadSource would."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from specserve.drafters.copy_pointer import CopyPointer
from specserve.drafters.head import HeadWeights, head_shapes
from specserve.drafters.head_device import DeviceHeads, head_tensors
from specserve.drafters.head_file_names import CONFIG_FILE, WEIGHTS_FILE
from specserve.drafters.head_files import LookaheadConfig, LookaheadHeadFile, pad_vocab, read_config, read_head
from specserve.drafters.head_source import HeadRunner, HeadSource
from specserve.kernels.head_loop import LoopRows, chain_reference

VOCAB_SIZE = 320
ADAPTERS = Path(__file__).parents[1] / "examples" / "adapters"


def random_head(seed: int, state_size: int, num_tokens: int, window: int, **fields) -> LookaheadHeadFile:
    """As a file would have it: bf16 values in fp32, the vocabulary padded."""
    generator = torch.Generator().manual_seed(seed)
    hidden_size = fields.pop("hidden_size", 64)
    config = LookaheadConfig(
        format_version=1, base_hash="", tokenizer_hash="", lora_hash="", hidden_size=hidden_size,
        state_size=state_size, copy_window=window,
        vocab=sorted(random.Random(seed).sample(range(VOCAB_SIZE), num_tokens)),
        **{"tap_layer": seed % 2, "draft_len": 6, "copy_start": 2} | fields,
    )  # fmt: skip
    tensors = {
        name: (
            torch.randn(1, *shape, generator=generator) * (0.5 if "bias" in name else shape[0] ** -0.5 * 2)
        ).bfloat16()
        for name, shape in head_shapes(hidden_size, state_size, num_tokens, window).items()
    }
    tensors["embed"] *= 4
    return LookaheadHeadFile(config, HeadWeights(**pad_vocab({name: t.float() for name, t in tensors.items()})))


def mixed_heads() -> list[LookaheadHeadFile]:
    return [
        random_head(0, 16, 100, 4),
        random_head(1, 40, 37, 0, draft_len=2),
        random_head(2, 33, 200, 8, copy_start=0),
        random_head(3, 16, 100, 1, copy_start=500),
    ]


def trained_heads() -> list[LookaheadHeadFile]:
    heads = []
    for path in sorted(path.parent for path in ADAPTERS.glob("*/lookahead_config.json")):
        config = read_config(path / CONFIG_FILE)
        heads.append(
            read_head(
                path / CONFIG_FILE, path / WEIGHTS_FILE, lora_hash=config.lora_hash, base_hash=config.base_hash,
                tokenizer_hash=config.tokenizer_hash, hidden_size=576, num_layers=30, vocab_size=49152,
            )
        )  # fmt: skip
    return heads


class _Recorded(HeadSource):
    """Remembers probabilities, of which HeadSource only keeps the class."""

    probability = -1.0

    def set_guess(self, choice: int, probability: float) -> None:
        self.probability = probability
        super().set_guess(choice, probability)


class Sequences:
    """`num_seqs` sequences, heads in turn, neighbours share one; every fifth has none."""

    def __init__(
        self, heads: list[LookaheadHeadFile], num_seqs: int, vocab_size: int, dtype, device: str, seed: int = 0
    ):
        self.rng = random.Random(seed)
        self.heads, self.dtype, self.device = heads, dtype, device
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden_size = heads[0].config.hidden_size
        self.layers = sorted({head.config.tap_layer for head in heads})
        self.head_of = [None if i % 5 == 4 else heads[i * len(heads) // num_seqs] for i in range(num_seqs)]
        self.vocab_size = vocab_size
        self.device_heads = DeviceHeads(
            hidden_size=self.hidden_size, vocab_size=vocab_size, tap_layers=self.layers, max_heads=len(heads) + 1,
            max_num_seqs=num_seqs + 3, max_prompt_len=50, max_draft_len=8,
            max_state_size=max(head.config.state_size for head in heads),
            max_vocab=max(len(head.config.vocab) for head in heads),
            max_window=max(head.config.copy_window for head in heads), device=device,
        )  # fmt: skip
        self.prompts = [self._tokens(head, self.rng.choice([1, 9, 50])) for head in self.head_of]
        self.tokens = [list(prompt) for prompt in self.prompts]
        self.sources: list[_Recorded | None] = []
        for idx, head in enumerate(self.head_of):
            source = None
            if head is not None:
                self.device_heads.add_head(head)
                assert self.device_heads.add_sequence(self.slot(idx), self.prompts[idx], head)
                local = {token: i for i, token in enumerate(head.config.vocab)}
                source = _Recorded(head, local, self.prompts[idx])
            self.sources.append(source)

    def slot(self, idx: int) -> int:
        return (idx * 7 + 2) % len(self.head_of) if len(self.head_of) % 7 else idx

    def _tokens(self, head: LookaheadHeadFile | None, num: int) -> list[int]:
        """Some of the head's own vocabulary, some that it does not know."""
        own = head.config.vocab if head is not None else [0]
        return [self.rng.choice([self.rng.choice(own), self.rng.randrange(self.vocab_size)]) for _ in range(num)]

    def step(self, num_guesses: int) -> None:
        """A step in which each sequence keeps some tokens; asserts that both sides draft the same."""
        first_rows, kept_of, sampled = [], [], []
        for idx, head in enumerate(self.head_of):
            kept = self._tokens(head, self.rng.randint(1, 5))
            start = self.rng.randrange(len(self.prompts[idx]))
            kept[: self.rng.randint(0, 5)] = self.prompts[idx][start : start + 3]  # a copy
            kept_of.append(kept)
            first_rows.append(len(sampled))
            sampled += kept + self._tokens(head, self.rng.randint(0, 3))  # rejected
            self.tokens[idx] += kept
        absent = self.rng.randrange(len(self.head_of))  # takes no part in this step, as an unfinished prompt
        del self.tokens[absent][-len(kept_of[absent]) :]
        hidden = torch.randn(len(sampled), self.hidden_size, generator=self.generator).to(self.dtype)
        taps = torch.randn(len(self.layers), len(sampled), self.hidden_size, generator=self.generator).to(self.dtype)
        taps *= 30
        padding = 2

        def table(values: list[int]) -> torch.Tensor:
            return torch.tensor(values + [-1] * padding, dtype=torch.int32, device=self.device)

        seqs = range(len(self.head_of))
        slots = [-1 if head is None else self.device_heads.slot_of(head) for head in self.head_of]
        last = [first + len(kept) - 1 for first, kept in zip(first_rows, kept_of, strict=True)]
        last[absent] = first_rows[absent] = -1
        rows = LoopRows(
            table([self.slot(idx) for idx in seqs]), table(slots), table(first_rows),
            table([len(kept) - 1 for kept in kept_of]), table(last), torch.tensor(sampled, device=self.device),
        )  # fmt: skip
        self.device_heads.results.fill_(-9)
        self.device_heads.launch(rows, hidden.to(self.device), taps.to(self.device), num_guesses)
        guesses = self.device_heads.guesses[:, :num_guesses].tolist()
        probs = self.device_heads.probabilities[:, :num_guesses].tolist()
        none = [-1] * num_guesses
        for idx in seqs:
            source = self.sources[idx]
            if source is None or idx == absent:
                assert guesses[idx] == none, idx
                continue
            tapped = taps[self.layers.index(source.head.config.tap_layer)]
            want, want_probs = host_chain(source, self.tokens[idx], hidden, tapped, last[idx], num_guesses)
            assert guesses[idx] == want, (idx, guesses[idx], want)
            torch.testing.assert_close(torch.tensor(probs[idx]), torch.tensor(want_probs), atol=1e-4, rtol=1e-3)
        assert guesses[len(seqs) : len(seqs) + padding] == [none] * padding
        assert guesses[len(seqs) + padding][0] == -9, "written behind the rows of the step"


def host_chain(source, tokens, hidden, tapped, row, num_guesses) -> tuple[list[int], list[float]]:
    """HeadSource and HeadRunner, fed with the head's own guesses."""
    source.set_hidden(hidden, tapped, row, len(tokens))
    source.begin(tokens)
    runner = HeadRunner()
    runner.begin([source])
    guesses, probs = [-1] * num_guesses, [0.0] * num_guesses
    for idx in range(num_guesses):
        runner.step([source])
        guess = source.peek()
        if guess is None:
            break
        guesses[idx], probs[idx] = guess.token, source.probability
        source.follow(guess.token)
    return guesses, probs


def reference_chain(source, prompt, tokens, hidden, tapped, row, num_guesses) -> tuple[list[int], list[float]]:
    config = source.head.config
    start = CopyPointer(prompt, config.copy_start, config.copy_window).position
    head = head_tensors(source.head, VOCAB_SIZE, "cpu")
    kept = tokens[len(prompt) :]
    guesses, probs, _ = chain_reference(
        head, config.state_size, hidden[row], tapped[row], prompt, start, kept, min(num_guesses, config.draft_len)
    )
    rest = num_guesses - len(guesses)
    return guesses + [-1] * rest, probs + [0.0] * rest

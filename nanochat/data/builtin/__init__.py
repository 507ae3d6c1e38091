"""The built-in world: a small town in simple English, from which the whole pipeline can be trained without a network.

Everything is a pure function of (split, seed, index): the corpus for pretraining (`documents`, `write_corpus`), the
conversations for fine-tuning (`conversations`), the problems for reinforcement learning (`word_problems`, `grade`).
Text of every training stage is free of held-out operand pairs and words (`pair_split`, `words`, `held_out_in`).
"""

from nanochat.data.builtin.chat import MIXTURE, conversations, grade, word_problems
from nanochat.data.builtin.corpus import documents, write_corpus
from nanochat.data.builtin.splits import held_out_in, pair_split, words

__all__ = [
    "MIXTURE",
    "conversations",
    "documents",
    "grade",
    "held_out_in",
    "pair_split",
    "word_problems",
    "words",
    "write_corpus",
]

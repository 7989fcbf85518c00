"""PanGu-alpha in NumPy, one sequence at a time and without any cache: what the fast code is compared with."""

import numpy as np


def forward(p, config, ids):
    """Logits [S, V] of one sequence of ids; `p` maps parameter names of `pangu.model` to arrays."""
    length = len(ids)
    hidden = p["embedding.word.table"][ids] + p["embedding.position.table"][:length]
    for number in range(config.layers - 1):
        hidden = _layer(p, f"layers.{number}", config, hidden)
    if config.final_norm == "before_query":
        hidden = _norm(p, "norm", hidden)
    hidden = _layer(p, "query_layer", config, hidden, p["query_embedding.table"][:length])
    if config.final_norm == "after_query":
        hidden = _norm(p, "norm", hidden)
    return hidden @ p["embedding.word.table"].T


def token_scores(p, config, ids, first):
    """log p of ids[first:], each given all before it."""
    logits = forward(p, config, np.asarray(ids[:-1])).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_p[np.arange(first - 1, len(ids) - 1), np.asarray(ids[first:])]


def is_greedy(p, config, ids, first):
    """Whether each of ids[first:] is the likeliest one after all before it."""
    best = forward(p, config, np.asarray(ids[:-1])).argmax(-1)
    return best[first - 1:].tolist() == list(ids[first:])


def _norm(p, name, x):
    spread = x - x.mean(-1, keepdims=True)
    return spread / np.sqrt((spread ** 2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.gamma"] + p[f"{name}.beta"]


def _linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _layer(p, name, config, hidden, query=None):
    normed = _norm(p, f"{name}.norm1", hidden)
    length, heads = len(hidden), config.heads
    q, k, v = (_linear(p, f"{name}.attention.{part}", x).reshape(length, heads, -1).swapaxes(0, 1)
               for part, x in (("query", normed if query is None else query), ("key", normed), ("value", normed)))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    hidden = hidden + _linear(p, f"{name}.attention.output", (weights @ v).swapaxes(0, 1).reshape(length, -1))
    inner = _linear(p, f"{name}.feed_forward.mapping", _norm(p, f"{name}.norm2", hidden))
    inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner ** 3)))
    return hidden + _linear(p, f"{name}.feed_forward.projection", inner)

"""Statements of the losses without a reference: likelihood, odds and mean log-probs."""

import math

from statements.base import completions, live, mean, nll_tokens, relu, smoothed, sp, states
from statements.pairs import running


def means(logps, lengths):
    """(S_w/n_w, S_l/n_l) of every pair."""
    return [(s[0] / n[0], s[1] / n[1]) for s, n in zip(logps, lengths, strict=True)]


def log_odds(a):
    """log(p / (1 - p)), p = e^a."""
    return a - math.log1p(-math.exp(a))


@states("sft")
def sft(x):
    """-log pi(y_t), token mean over the batch."""
    return mean(-x.token_logps[b, k, t] for b, k in completions(x) for t in live(x, b, k))


@states("dft")
def dft(x):
    """-sg[pi(y_t)] log pi(y_t), token mean."""
    return mean(-math.exp(x.sg.token_logps[b, k, t]) * x.token_logps[b, k, t]
                for b, k in completions(x) for t in live(x, b, k))


@states("simpo")
def simpo(x, beta, gamma):
    """sp(-(beta S_w/n_w - beta S_l/n_l - gamma))."""
    return mean(sp(-(beta * w - beta * lo - gamma)) for w, lo in means(x.logps, x.lengths))


@states("alpha_po")
def alpha_po(x, beta, gamma, alpha, clip):
    """sp(-(beta (r_w - r_l) - gamma)), r = (1 - pbar^-alpha)/alpha; the exponent clipped, the limit at alpha = 0."""
    def reward(a):
        return a if alpha == 0 else (1 - math.exp(min(-alpha * a, clip))) / alpha

    return mean(sp(-(beta * (reward(w) - reward(lo)) - gamma)) for w, lo in means(x.logps, x.lengths))


@states("orpo")
def orpo(x, lam):
    """NLL_tok(y_w) + lambda mean sp(-(o_w - o_l))."""
    return nll_tokens(x) + lam * mean(sp(-(log_odds(w) - log_odds(lo))) for w, lo in means(x.logps, x.lengths))


@states("asft")
def asft(x, lam):
    """-log pbar_w + lambda (sp(-o_w) + sp(o_l))."""
    return mean(-w + lam * (sp(-log_odds(w)) + sp(log_odds(lo))) for w, lo in means(x.logps, x.lengths))


@states("cpo")
def cpo(x, beta, lam, nll):
    """mean sp(-beta (S_w - S_l)) + lambda NLL(y_w)."""
    likelihood = nll_tokens(x) if nll == "tokens" else mean(-s[0] for s in x.logps)
    return mean(sp(-beta * (s[0] - s[1])) for s in x.logps) + lam * likelihood


@states("slic_hf")
def slic_hf(x, delta, lam):
    """relu(delta - S_w + S_l) + lambda (-S_w), the chosen as the target."""
    return mean(relu(delta - s[0] + s[1]) - lam * s[0] for s in x.logps)


@states("new_desiderata")
def new_desiderata(x, lam):
    """mean sp(-(S_w - S_l)) + lambda mean -S(y')."""
    drawn = [-s for row in x.reference_sample_logps for s in row]
    return mean(sp(-(s[0] - s[1])) for s in x.logps) + lam * mean(drawn)


@states("alpha_dpo")
def alpha_dpo(x, beta, gamma_ratio, alpha, momentum, label_smoothing):
    """Smoothed logistic of beta (u - sg[g + alpha z]), z the standardised gap after the update of mu and sd."""
    u = [w - lo for w, lo in means(x.logps, x.lengths)]
    fixed = [w - lo for w, lo in means(x.sg.logps, x.lengths)]
    gap = [a - (w - lo) for a, (w, lo) in zip(fixed, means(x.ref_logps, x.lengths), strict=True)]
    state = running(x.state, gap, momentum)
    z = [(g - state["mean"]) / state["std"] for g in gap]
    value = mean(smoothed(beta * (a - (gamma_ratio + alpha * s)), label_smoothing) for a, s in zip(u, z, strict=True))
    return value, state


@states("simper")
def simper(x):
    """-exp(S_w/n_w) + exp(S_l/n_l)."""
    return mean(-math.exp(w) + math.exp(lo) for w, lo in means(x.logps, x.lengths))


@states("mapo_margin")
def mapo_margin(x, beta, snr, steps):
    """mean[e_w] + b mean sp(-T (F(e_w) - F(e_l))), F(e) = s e / (e^(s e) - 1), e = -S/n."""
    def score(e):
        return snr * e / math.expm1(snr * e)

    return mean(-w + beta * sp(-steps * (score(-w) - score(-lo))) for w, lo in means(x.logps, x.lengths))


def triple(x):
    """(gold, chosen, rejected) places: on pairs the chosen answer is the gold one."""
    return (0, 1, 2) if x.logps.shape[1] == 3 else (0, 0, 1)


@states("tpo_triple")
def tpo_triple(x, beta, alpha):
    """mean sp(-beta (S_w - S_l)) + alpha NLL_tok(y_g)."""
    gold, w, lo = triple(x)
    return mean(sp(-beta * (s[w] - s[lo])) for s in x.logps) + alpha * nll_tokens(x, gold)


@states("tpo_triple:length")
def tpo_length(x, beta, gamma, alpha):
    """mean sp(-(beta (S_w/n_w - S_l/n_l) - gamma)) + alpha NLL_tok(y_g)."""
    gold, w, lo = triple(x)
    return (mean(sp(-(beta * (s[w] / n[w] - s[lo] / n[lo]) - gamma)) for s, n in zip(x.logps, x.lengths, strict=True))
            + alpha * nll_tokens(x, gold))

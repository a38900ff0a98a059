"""Statements of the reference-anchored pair losses of the DPO family."""

import math

from statements.base import gaps, hold, live, lr, mean, ratios, relu, sigmoid, smoothed, sp, states, token_lr


@states("dpo", "cdpo")
def dpo(x, beta, label_smoothing):
    """(1-e) sp(-beta Delta) + e sp(beta Delta)."""
    return mean(smoothed(beta * d, label_smoothing) for d in gaps(x))


@states("robust_dpo")
def robust_dpo(x, beta, label_smoothing):
    """[(1-e) sp(-m) - e sp(m)] / (1 - 2e)."""
    e = label_smoothing
    return mean(((1 - e) * sp(-beta * d) - e * sp(beta * d)) / (1 - 2 * e) for d in gaps(x))


@states("ipo")
def ipo(x, tau, length_average):
    """(Delta - 1/(2 tau))^2, Delta of sums or of means."""
    total = []
    for (w, lo), (n_w, n_l) in zip(ratios(x), x.lengths, strict=True):
        d = w / n_w - lo / n_l if length_average else w - lo
        total.append((d - 1 / (2 * tau)) ** 2)
    return mean(total)


@states("dpo:ln")
def ln_dpo(x, beta):
    """sp(-beta (lr_w/n_w - lr_l/n_l))."""
    return mean(sp(-beta * (w / n_w - lo / n_l)) for (w, lo), (n_w, n_l) in zip(ratios(x), x.lengths, strict=True))


@states("odpo")
def odpo(x, beta, alpha, offset):
    """sp(-(beta Delta - alpha f)); ties and inversions are dropped before the logarithm."""
    total = []
    for d, (s_w, s_l) in zip(gaps(x), x.scores, strict=True):
        if s_w > s_l and (offset == "difference" or s_l > 0):
            f = math.log(s_w - s_l) if offset == "difference" else math.log(s_w / s_l)
            total.append(sp(-(beta * d - alpha * f)))
    return mean(total)


@states("h_dpo")
def h_dpo(x, beta, alpha):
    """sp(-(alpha beta (S_w - S_l) - beta (R_w - R_l)))."""
    return mean(sp(-(alpha * beta * (s[0] - s[1]) - beta * (r[0] - r[1])))
                for s, r in zip(x.logps, x.ref_logps, strict=True))


@states("dpo_shift")
def dpo_shift(x, beta, shift):
    """sp(-(beta lr_w - f beta lr_l))."""
    return mean(sp(-(beta * w - shift * beta * lo)) for w, lo in ratios(x))


@states("flex_dpo")
def flex_dpo(x, beta_chosen, beta_rejected):
    """sp(-(beta+ lr_w - beta- lr_l))."""
    return mean(sp(-(beta_chosen * w - beta_rejected * lo)) for w, lo in ratios(x))


@states("sft_dpo")
def sft_dpo(x, beta, gamma):
    """L_DPO + gamma mean[-S_w]."""
    return mean(sp(-beta * d) for d in gaps(x)) + gamma * mean(-s[0] for s in x.logps)


@states("rpo")
def rpo(x, beta, eta, form):
    """L_DPO + eta beta mean[-S_w], or + eta mean[-S_w/n_w]."""
    if form == "cumulative":
        extra = eta * beta * mean(-s[0] for s in x.logps)
    else:
        extra = eta * mean(-s[0] / n[0] for s, n in zip(x.logps, x.lengths, strict=True))
    return mean(sp(-beta * d) for d in gaps(x)) + extra


@states("r_dpo", "ilr_dpo")
def r_dpo(x, beta, alpha):
    """sp(-(beta Delta + alpha n_w - alpha n_l))."""
    return mean(sp(-(beta * d + alpha * n_w - alpha * n_l)) for d, (n_w, n_l) in zip(gaps(x), x.lengths, strict=True))


@states("dpop")
def dpop(x, beta, penalty):
    """sp(-beta (Delta - lambda relu(R_w - S_w)))."""
    return mean(sp(-beta * (w - lo - penalty * relu(-w))) for w, lo in ratios(x))


@states("f_dpo")
def f_dpo(x, beta, divergence, alpha, clip):
    """sp(-(beta f'(u_w) - beta f'(u_l))), u = e^lr, the exponent clipped."""
    def slope(z):
        if divergence == "reverse_kl":
            return z
        if divergence == "forward_kl":
            return -math.exp(min(-z, clip))
        if divergence == "js":
            return -sp(-z)
        return -math.exp(min(-alpha * z, clip)) / alpha

    return mean(sp(-(beta * slope(w) - beta * slope(lo))) for w, lo in ratios(x))


@states("cal_dpo")
def cal_dpo(x, beta, calibration_weight):
    """sp(-Delta) + c [(lr_w - 1/(2 beta))^2 + (lr_l + 1/(2 beta))^2]."""
    half = 1 / (2 * beta)
    return mean(sp(-(w - lo)) + calibration_weight * ((w - half) ** 2 + (lo + half) ** 2) for w, lo in ratios(x))


@states("apo:zero")
def apo_zero(x, beta):
    """1 - sigma(beta lr_w) + sigma(beta lr_l)."""
    return mean(1 - sigmoid(beta * w) + sigmoid(beta * lo) for w, lo in ratios(x))


@states("apo:down")
def apo_down(x, beta):
    """sigma(beta lr_w) + 1 - sigma(beta Delta)."""
    return mean(sigmoid(beta * w) + 1 - sigmoid(beta * (w - lo)) for w, lo in ratios(x))


@states("exo")
def exo(x, beta, label_smoothing):
    """KL((sigma(m), sigma(-m)) || (1-e, e)), m = beta Delta."""
    e = label_smoothing
    total = []
    for d in gaps(x):
        p, q = sigmoid(beta * d), sigmoid(-beta * d)
        total.append(p * (math.log(p) - math.log(1 - e)) + q * (math.log(q) - math.log(e)))
    return mean(total)


@states("discopop")
def discopop(x, beta, tau, clip):
    """(1 - s) sp(-rho) + s e^-rho, s = sigma(rho/tau); the second part as one exponential, clipped."""
    def one(rho):
        return (1 - sigmoid(rho / tau)) * sp(-rho) + math.exp(min(-rho - sp(-rho / tau), clip))

    return mean(one(beta * d) for d in gaps(x))


@states("wpo")
def wpo(x, beta):
    """sg[min(1, w_w w_l)] sp(-beta Delta), w = exp of the mean of log pi(y_t) - log sum_v pi(v)^2."""
    def weight(b, k):
        return math.exp(mean(x.sg.token_logps[b, k, t] - x.sg.log_sum_sq[b, k, t] for t in live(x, b, k)))

    def ratio(b, k):
        return sum(token_lr(x, b, k, t) for t in live(x, b, k))

    return mean(min(1.0, weight(b, 0) * weight(b, 1)) * sp(-beta * (ratio(b, 0) - ratio(b, 1)))
                for b in range(len(x.mask)))


@states("aot")
def aot(x, beta, label_smoothing, paired):
    """Smoothed logistic of beta (u_i - v_i), both sorted over the batch."""
    if paired:
        u, v = sorted(s[0] - s[1] for s in x.logps), sorted(r[0] - r[1] for r in x.ref_logps)
    else:
        u, v = sorted(w for w, _ in ratios(x)), sorted(lo for _, lo in ratios(x))
    return mean(smoothed(beta * (a - b), label_smoothing) for a, b in zip(u, v, strict=True))


def running(state, values, momentum):
    """The state after a batch: exponential averages of its mean and of its sample deviation."""
    centre = mean(values)
    deviation = math.sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - 1))
    return {"mean": momentum * float(state["mean"]) + (1 - momentum) * centre,
            "std": momentum * float(state["std"]) + (1 - momentum) * deviation}


@states("beta_dpo")
def beta_dpo(x, beta, a, drop, momentum, kept=None):
    """sp(-beta_b Delta) over the kept pairs, which a draw decides: `kept`, or all of them where nothing is dropped."""
    assert kept is not None or drop == 0
    gap = gaps(x.sg)
    kept = range(len(gap)) if kept is None else kept
    state = running(x.state, gap, momentum)
    batch_beta = max(1e-3, beta * (1 + a * mean(gap[i] for i in kept) - a * state["mean"]))
    delta = gaps(x)
    return mean(sp(-batch_beta * delta[i]) for i in kept), state


@states("self_supervised_po")
def self_supervised_po(x, beta, gamma):
    """L_DPO + gamma mean of the cross-entropy of a version's number."""
    degree = []
    for versions in x.degree_logits:
        for number, logits in enumerate(versions):
            degree.append(math.log(sum(math.exp(z) for z in logits)) - logits[number])
    return mean(sp(-beta * d) for d in gaps(x)) + gamma * mean(degree)


@states("chi_po")
def chi_po(x, beta, mix, reward_bound, clip):
    """sp(-m), m = beta (phi_w - phi_l) held in +-2 bound, phi = e^min(lr, c) + g lr."""
    def phi(z):
        return math.exp(min(z, clip)) + mix * z

    return mean(sp(-hold(beta * phi(w) - beta * phi(lo), -2 * reward_bound, 2 * reward_bound)) for w, lo in ratios(x))


@states("squared_po")
def squared_po(x, beta, clip):
    """sp(-(beta lr_w e^-lr_w - beta lr_l e^-lr_l)), -lr held at the clip in the exponent."""
    def reward(z):
        return beta * z * math.exp(min(-z, clip))

    return mean(sp(-(reward(w) - reward(lo))) for w, lo in ratios(x))


@states("dr_dpo")
def dr_dpo(x, beta, beta_prime):
    """-b' log((1/B) sum_i exp(-l_i/b'))."""
    return -beta_prime * math.log(mean(math.exp(-sp(-beta * d) / beta_prime) for d in gaps(x)))


@states("c2_dpo")
def c2_dpo(x, beta, lam, penalty):
    """L_DPO + lambda c^2 or lambda |c|, c = lr_w + lr_l."""
    return mean(sp(-beta * (w - lo)) + lam * ((w + lo) ** 2 if penalty == "l2" else abs(w + lo)) for w, lo in ratios(x))


@states("focal_po")
def focal_po(x, beta, gamma, detach):
    """-p^g log p, p = sigma(beta Delta); detached: sg[p^g]."""
    return mean(-sigmoid(beta * f) ** gamma * math.log(sigmoid(beta * d))
                for d, f in zip(gaps(x), gaps(x.sg if detach else x), strict=True))


@states("minor_dpo")
def minor_dpo(x, beta):
    """sp(-beta (lr_w - relu(lr_l)))."""
    return mean(sp(-beta * (w - relu(lo))) for w, lo in ratios(x))


@states("bpo_balanced")
def bpo_balanced(x, beta, alpha):
    """sp(-beta min(lr_w, -a lr_l))."""
    return mean(sp(-beta * min(w, -alpha * lo)) for w, lo in ratios(x))


@states("gpo")
def gpo(x, beta, link, clip):
    """f(beta Delta)."""
    f = {"logistic": lambda m: sp(-m), "hinge": lambda m: relu(1 - m), "square": lambda m: (m - 1) ** 2,
         "exponential": lambda m: math.exp(min(-m, clip)), "truncated_square": lambda m: relu(1 - m) ** 2,
         "savage": lambda m: 1 / (1 + math.exp(m)) ** 2}[link]
    return mean(f(beta * d) for d in gaps(x))


def coin_kl(p, q):
    """KL(Bern(sigma(p)) || Bern(sigma(q)))."""
    return (sigmoid(p) * math.log(sigmoid(p) / sigmoid(q)) + sigmoid(-p) * math.log(sigmoid(-p) / sigmoid(-q)))


@states("rpo_reward_aware")
def rpo_reward_aware(x, beta, eta, sft_weight, distance):
    """Distance of m = beta Delta from d = eta (r*_w - r*_l), + weight NLL_seq(y_w)."""
    total = []
    for gap, (s_w, s_l) in zip(gaps(x), x.scores, strict=True):
        m, d = beta * gap, eta * (s_w - s_l)
        total.append({"sq": (m - d) ** 2, "bwd_kl": coin_kl(d, m), "fwd_kl": coin_kl(m, d)}[distance])
    return mean(total) + sft_weight * mean(-s[0] for s in x.logps)


@states("rebel")
def rebel(x, eta):
    """((1/eta) (lr_0 - lr_1) - (r_0 - r_1))^2."""
    return mean((d / eta - (s[0] - s[1])) ** 2 for d, s in zip(gaps(x), x.scores, strict=True))


@states("kto_pair")
def kto_pair(x, beta):
    """Mean over both halves of 1 - sigma(beta (lr_w - k_l)) and 1 - sigma(beta (k_w - lr_l)), k under sg."""
    k_w, k_l = relu(mean(w for w, _ in ratios(x.sg))), relu(mean(lo for _, lo in ratios(x.sg)))
    good = [1 - sigmoid(beta * (w - k_l)) for w, _ in ratios(x)]
    bad = [1 - sigmoid(beta * (k_w - lo)) for _, lo in ratios(x)]
    return mean(good + bad)


@states("rso:hinge_norm")
def rso_hinge_norm(x, gamma):
    """relu(1 - gamma Delta)."""
    return mean(relu(1 - gamma * d) for d in gaps(x))


@states("implicit_prm:dpo")
def implicit_prm_dpo(x, beta):
    """-log sigma(beta (l(y_w) - l(y_l)))."""
    return mean(sp(-(beta * lr(x, b, 0) - beta * lr(x, b, 1))) for b in range(len(x.logps)))


@states("multi_turn_dpo")
def multi_turn_dpo(x, beta, nll_weight):
    """-log sigma(beta (l(tau_w) - l(tau_l))) + c NLL of the chosen."""
    return mean(sp(-beta * d) for d in gaps(x)) + nll_weight * mean(-s[0] for s in x.logps)


@states("sppo:hard")
def sppo_hard(x, beta):
    """(lr_w - 1/(2 beta))^2 + (lr_l + 1/(2 beta))^2."""
    return mean((w - 1 / (2 * beta)) ** 2 + (lo + 1 / (2 * beta)) ** 2 for w, lo in ratios(x))

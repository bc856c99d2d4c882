def contrast(first, second, heat):
    """InfoNCE of two views (B, D): mean over b of -log(exp(s_bb / heat) / sum over j of exp(s_bj / heat)).

    s_bj is the cosine of first[b] and second[j].
    """
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    second = second / np.linalg.norm(second, axis=1, keepdims=True)
    scores = first @ second.T / heat
    highest = scores.max(1, keepdims=True)
    logs = highest[:, 0] + np.log(np.exp(scores - highest).sum(1))
    return float((logs - np.diag(scores)).mean())

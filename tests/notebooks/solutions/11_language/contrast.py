def contrast(similarity):
    losses = []
    for table in (similarity, similarity.T):
        highest = table.max(1, keepdims=True)
        logs = table - highest - np.log(np.exp(table - highest).sum(1, keepdims=True))
        losses.append(-np.diag(logs).mean())
    return sum(losses) / 2

def auc(scores, outcomes):
    sick, healthy = scores[outcomes == 1][:, None], scores[outcomes == 0][None]
    return ((sick > healthy) + 0.5 * (sick == healthy)).mean()

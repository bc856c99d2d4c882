"""Deliberate errors in recipes of `sam_adaptation`."""

ERRORS = {
    "salt": [
        ("return values * (1 + scale) + shift", "return values * (1 + scale)"),
        ("(self.left[:, self.top :] @ self.down)", "(self.left[:, : self.down.shape[0]] @ self.down)"),
    ],
    "medsamix": [
        (
            "torch.where(labelled.labels == self.specialty, labelled.labels,",
            "torch.where(labelled.labels > 0, labelled.labels,",
        ),
    ],
    "sam_med2d": [("nn.Parameter(torch.zeros(width, 1, 1))", "nn.Parameter(torch.ones(width, 1, 1))")],
    "sas": [
        ("return images + inside * levels", "return images + levels"),
        ("new_labels = torch.zeros_like(labels)", "new_labels = labels.clone()"),
    ],
    "h_sam": [
        ("strength = 1 - counts / counts.max()", "strength = counts / counts.max()"),
        ("strength[:, None] * (FLOOR + prior).log()", "strength[:, None] * prior"),
    ],
    "lesion_sam3": [("same = case_of[mine] == case_of[theirs]", "same = case_of[mine] >= 0")],
    "medical_sam3": [("boxes[:, 2:] + slack]", "boxes[:, 2:] - slack]")],
}

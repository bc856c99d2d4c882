"""Deliberate errors in recipes of `semi_supervised`."""

ERRORS = {
    "bcp": [
        ("IGNORE), pseudo.masked_fill(box, IGNORE)", "IGNORE), pseudo"),
        ("outward = copy_paste(unlabelled.images, labelled.images, box)", "outward = unlabelled.images"),
        ('largest_parts(nets["average"](images)', '(nets["average"](images)'),
    ],
    "sasnet": [
        ("torch.where(self.seen[slot], (before + now) / 2, now)", "now"),
        ("distance[inwards == 1] = 0", "pass"),
    ],
}

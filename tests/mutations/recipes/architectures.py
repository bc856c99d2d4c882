"""Deliberate errors in recipes of `architectures`."""

ERRORS = {
    "wau": [
        ("return smooth + self.attend(deep, skip) if self.attention else smooth", "return smooth"),
        ("attn_mask=self.bias.to(queries.dtype)", "attn_mask=None"),
    ],
    "unetpp": [
        ("range(0 if self.dense else column - 1, column)", "range(column - 1, column)"),
        ("range(depth + 1)", "range(self.depth + 1)"),
    ],
    "m2snet": [
        ("both = fine - coarse if subtract else fine + coarse", "both = fine + coarse"),
    ],
    "pranet": [("return 1 - logits.float().softmax(1)", "return logits.float().softmax(1)")],
    "_scan": [
        ("states[:, c].addcmul_(passed[:, c], states[:, before, last, None])", "pass"),
        ("torch.mul(for_added[:, 1:], states[:, :-1], out=for_decay[:, 1:])", "pass"),
    ],
    "msvm_unet": [
        ("[(side - weight.shape[-1]) // 2] * 4", "[0, side - weight.shape[-1]] * 2"),
        ("heard = heard + scan(tokens[:, way])[:, inverse(way)]", "heard = heard + scan(tokens[:, way])"),
    ],
    "swtr_unet": [
        ("side // 2 if shift and number % 2 else 0", "side // 2 if shift else 0"),
        (
            "[tokens(level) for tokens, level in zip(self.tokens, levels[first:], strict=True)]",
            "[level for tokens, level in zip(self.tokens, levels[first:], strict=True)]",
        ),
    ],
    "symbolic_seg": [
        ("heard = self.embedding(sentence[-1])", "pass"),
        (
            "return F.gumbel_softmax(logits, temperature, hard=True)",
            "return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)",
        ),
    ],
    "u_bench": [
        ("return 2 * quality * efficient / (quality + efficient)", "return (quality + efficient) / 2"),
    ],
}
TESTED_BY = {
    "_scan": "lightm_unet",
}
"""Whose tests notice, where these are not in a file of the same name."""

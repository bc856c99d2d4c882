"""What the signs of `_reports.SIGNS` look like in a chest X-ray, as a textbook would say it in short sentences."""

NAMES = {
    "normal": "normal lungs",
    "tuberculosis": "pulmonary tuberculosis",
    "cavity": "cavity",
    "effusion": "pleural effusion",
    "pleura": "pleural thickening",
    "scars": "scars",
    "infiltrate": "infiltrate",
    "nodules": "nodules",
    "calcified": "calcification",
}
"""What a sign is called."""
DESCRIPTIONS = {
    "normal": (
        "both lungs are dark and clear",
        "no spot, shadow or line that should not be there",
        "the angles between ribs and diaphragm are sharp and dark",
    ),
    "tuberculosis": (
        "patchy bright shadows, mostly in the upper parts of the lungs",
        "clouds, small spots and lines beside each other",
        "bright shadows near the top of the lung, sometimes around a hole",
    ),
    "cavity": ("a bright ring around dark air", "a hole within a bright shadow"),
    "effusion": (
        "bright fluid fills the lowest part of the chest",
        "the angle between ribs and diaphragm is blunt",
        "a bright area with an upper edge that rises towards the ribs",
    ),
    "pleura": ("a bright band along the ribs", "the edge of the lung is thick"),
    "scars": ("thin bright lines that pull at the lung", "a part of the lung has shrunk and is streaky"),
    "infiltrate": ("a bright cloud without a sharp edge", "dense tissue where dark air should be"),
    "nodules": ("small round bright spots", "a round spot with a clear edge"),
    "calcified": ("very bright spots with sharp edges", "specks as white as bone"),
}
"""Sentences by sign; `normal` where a report states none."""

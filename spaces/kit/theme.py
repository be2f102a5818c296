"""The look of the pages: paper and ink, one accent, in light and dark; fonts are those of the system."""

from pathlib import Path

import gradio as gr
from gradio.themes.utils import colors, sizes

CSS = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")

CORAL = colors.Color(
    name="coral",
    c50="#fff3f0",
    c100="#ffe4dd",
    c200="#ffcabd",
    c300="#ffa690",
    c400="#ff8166",
    c500="#ee5b3c",
    c600="#c93f22",
    c700="#a8321a",
    c800="#8a2b18",
    c900="#722818",
    c950="#3e1108",
)
PAPER = colors.Color(
    name="paper",
    c50="#faf9f7",
    c100="#f3f1ed",
    c200="#e5e1da",
    c300="#cfc9bf",
    c400="#a49c90",
    c500="#756e64",
    c600="#575149",
    c700="#423d37",
    c800="#2a2723",
    c900="#1d1b18",
    c950="#131210",
)
FONT = ("ui-sans-serif", "system-ui", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")

HEAD = """
<meta name="color-scheme" content="light dark">
<script>
document.documentElement.lang = "en";
window.hubgenTheme = () => {
  const dark = document.body.classList.toggle("dark");
  try { localStorage.setItem("hubgen-theme", dark ? "dark" : "light"); } catch (error) { /* private windows */ }
};
addEventListener("DOMContentLoaded", () => {
  let chosen = null;
  try { chosen = localStorage.getItem("hubgen-theme"); } catch (error) { /* private windows */ }
  if (chosen && !new URLSearchParams(location.search).has("__theme")) {
    document.body.classList.toggle("dark", chosen === "dark");
  }
});
</script>
"""


def theme() -> gr.themes.Base:
    """Of all pages."""
    look = gr.themes.Base(
        primary_hue=CORAL,
        secondary_hue=CORAL,
        neutral_hue=PAPER,
        text_size=sizes.text_md,
        spacing_size=sizes.spacing_lg,
        radius_size=sizes.radius_lg,
        font=FONT,
        font_mono=MONO,
    )
    return look.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_800",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_700",
        border_color_accent="*primary_600",
        border_color_accent_dark="*primary_400",
        color_accent="*primary_600",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="0px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_100",
        block_title_text_weight="600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_background_fill="*neutral_50",
        input_background_fill_dark="*neutral_800",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_400",
        input_border_width="1px",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_400",
        button_primary_background_fill_hover_dark="*primary_300",
        button_primary_text_color="white",
        button_primary_text_color_dark="*neutral_950",
        button_primary_text_color_hover_dark="*neutral_950",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_text_color="*neutral_800",
        button_secondary_text_color_dark="*neutral_100",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_border_width="1px",
        button_large_radius="12px",
        button_small_radius="999px",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
        checkbox_background_color_selected="*primary_600",
        checkbox_background_color_selected_dark="*primary_600",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_500",
        checkbox_label_background_fill="*neutral_50",
        checkbox_label_background_fill_dark="*neutral_800",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        link_text_color_hover="*primary_800",
        link_text_color_hover_dark="*primary_200",
        link_text_color_visited="*primary_700",
        link_text_color_visited_dark="*primary_300",
        loader_color="*primary_600",
        loader_color_dark="*primary_400",
    )

"""The page: words to pictures, step by step.

python app.py        in this folder, as a Space runs it, with settings from the environment (hubgen.spaces.kit.settings)
hubgen demo          the same from the command line
"""

import os

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401  (before torch: it lends the GPU for single calls)

from hubgen.spaces.kit import stage
from hubgen.spaces.kit.page import Page
from hubgen.spaces.kit.service import Service
from hubgen.spaces.kit.settings import Settings

# isort: split
import gradio as gr

from tabs import control, create, look_inside, style, transform
from tabs.desk import Desk

TITLE = "hubgen"
TEXT = "Type words, watch a picture form, and look inside the model that draws it."


def build(service: Service) -> Page:
    """The page around a model, which may still be loading."""
    desk = Desk(service)
    with Page(service.settings.limits, title=f"{TITLE}: text to image") as page:
        gr.HTML(stage.header(TITLE, TEXT))
        with gr.Tabs():
            with gr.Tab("Create", id="create"):
                create.build(page, desk)
            with gr.Tab("Transform", id="transform"):
                transform.build(desk)
            with gr.Tab("Control", id="control"):
                control.build(desk)
            with gr.Tab("Style", id="style"):
                style.build(desk)
            with gr.Tab("Look inside", id="inside"):
                look_inside.build(desk)
        gr.HTML(stage.footer(desk.about_lines()))
        gr.api(desk.about, api_name="about", queue=False)
    return page


def main() -> None:
    """Checks the settings, then builds the page while the model loads, and serves it."""
    service = Service(Settings.from_environment())
    service.start()
    build(service).serve(service, TITLE)


if __name__ == "__main__":
    main()

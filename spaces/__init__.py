"""Pages for pictures: a folder a Gradio Space, and `kit`, what they share (installed as hubgen.spaces.kit)."""

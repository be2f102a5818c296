"""Pipelines around the one denoising loop; installed as `hubgen.pipelines`."""

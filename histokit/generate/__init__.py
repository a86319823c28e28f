"""From a job table to pictures and manifest rows: img2img, guided."""

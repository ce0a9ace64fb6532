"""How good predictions and images are, with intervals. Knows neither Ray nor how anything was trained."""

"""What only the notebooks use: checkers, pictures, sliders, home-made tasks."""

"""What only the notebooks use: checkers of the exercises, figures, pictures with a slider, the graph of heads."""

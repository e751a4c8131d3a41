"""The paper's CIFAR-10 settings with lightly; the recipe itself is in ``adapters/lightly/recipe.py``.

python examples/lightly_cifar10.py --help
"""

from slr_plugin.adapters.lightly.recipe import main

if __name__ == "__main__":
    main()

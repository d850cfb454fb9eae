"""From images to a quantisation plan.

    images.open_images ─▶ preprocess.write_pixels ─▶ EvalSet ─▶ checks.inspect
                                                        │
    Program ─▶ collect.calibrate(preprocess.batches) ─▶ Ranges ─▶ plan.plan ─▶ QuantPlan ─▶ plan.save

Everything but `collect` can be imported without torch: devices preprocess evaluation images with it.
A new method is one file with a config and a function, and one line in `observers.OBSERVERS`.
"""

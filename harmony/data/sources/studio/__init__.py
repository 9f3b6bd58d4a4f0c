"""The studio dataset: physically based renders of an object in a scene, with ground truth that photographs lack.

A scene is a pure function of (seed, index): kind, color, finish, ground, light, a second light, camera, backdrop and,
in a third of the scenes, other objects that belong to the background. For each scene Mitsuba 3 (``scalar_rgb``, path
tracer) renders

    image   the object under light A                               data/<id>.jpg
    plate   the scene under light A without the object             plates/<id>.jpg
    relit   the same scene under light B                           relit/<id>.jpg
    mask    where the object is visible (shape index, not color)  labels/masks/<HEX>/<...>.png
    shadow  where the object darkens the plate outside the mask    shadows/<id>.png

so that "object of relit pasted on plate" is a composite whose harmonized truth, with its cast shadow, is ``image``.
Files are in Open Images V7 layout, one folder for each split; captions name color, kind, ground and light. Some
(kind, color, light) combinations exist only in the test split.
"""

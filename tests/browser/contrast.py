"""WCAG's contrast of all text that a workflow shows: of the page's elements, and by LiteGraph's colours on a canvas."""

from __future__ import annotations

from typing import Any

ENOUGH = 4.5
# What the page draws so on every pack's nodes, in Nodes 2.0: the pack's name (3.7), and above a text its name (4.3). A
# widget that a wire feeds is greyed out, which WCAG leaves out too.
PAGES_OWN = {"instruct-pix2pix", "instruction", "caption", "edited_caption", "captions", "labels", "text"}
ELEMENTS = """() => {
    const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
        .getContext('2d', {willReadFrequently: true});
    const rgba = colour => {  // whatever the notation
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        const [red, green, blue, alpha] = context.getImageData(0, 0, 1, 1).data;
        return [red, green, blue, alpha / 255];
    };
    const over = (top, below) => [0, 1, 2].map(n => top[n] * top[3] + below[n] * (1 - top[3]));
    const ground = element => {
        const layers = [];
        for (let one = element; one; one = one.parentElement) {
            const colour = rgba(getComputedStyle(one).backgroundColor);
            layers.push(colour);
            if (colour[3] > 0.99) break;
        }
        return layers.reverse().reduce((below, top) => over(top, below), [24, 24, 24]);
    };
    const faded = element => {
        let left = 1;
        for (let one = element; one; one = one.parentElement) left *= Number(getComputedStyle(one).opacity);
        return left;
    };
    const measure = (words, owner) => {
        const box = owner.getBoundingClientRect(), style = getComputedStyle(owner);
        if (!words.trim() || box.width < 2 || box.height < 2 || style.visibility === 'hidden') return;
        const strength = faded(owner);
        if (strength < 0.05 || owner.closest('[aria-hidden="true"], .sr-only')) return;
        const below = ground(owner), colour = rgba(style.color);
        found.push([words.trim().slice(0, 40), over([...colour.slice(0, 3), colour[3] * strength], below), below]);
    };
    const found = [];
    for (const root of document.querySelectorAll('[data-node-id], .dom-widget, .comfy-markdown')) {
        const texts = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
        while (texts.nextNode()) {
            const owner = texts.currentNode.parentElement;
            if (!['STYLE', 'SCRIPT', 'TEXTAREA', 'OPTION'].includes(owner.tagName) && !owner.closest('svg'))
                measure(texts.currentNode.textContent, owner);
        }
        for (const field of root.querySelectorAll('input, textarea')) measure(String(field.value || ''), field);
    }
    return found;
}"""
# LiteGraph draws these itself, in its palette's colours and the nodes' own.
DRAWN = """() => {
    const page = window.LiteGraph, found = [];
    const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
        .getContext('2d', {willReadFrequently: true});
    const rgb = colour => {
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
    };
    for (const node of window.app.graph.nodes) {
        const head = rgb(node.color || node.constructor.color || page.NODE_DEFAULT_COLOR);
        const body = rgb(node.bgcolor || node.constructor.bgcolor || page.NODE_DEFAULT_BGCOLOR);
        found.push([`title ${node.title}`, rgb(page.NODE_TITLE_COLOR), head]);
        if (node.inputs?.length || node.outputs?.length)
            found.push([`slots of ${node.title}`, rgb(page.NODE_TEXT_COLOR), body]);
        for (const widget of node.widgets || []) {
            if (widget.element || widget.hidden) continue;
            const below = rgb(page.WIDGET_BGCOLOR);
            found.push([`${node.title}: ${widget.name}`, rgb(page.WIDGET_SECONDARY_TEXT_COLOR), below]);
            found.push([`${node.title}: ${widget.value}`, rgb(page.WIDGET_TEXT_COLOR), below]);
        }
    }
    return found;
}"""


def contrast(one: Any, two: Any) -> float:
    """WCAG 2's ratio of two colours."""

    def luminance(colour: Any) -> float:
        parts = [part / 255 for part in colour]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(two)))
    return (light + 0.05) / (dark + 0.05)


def texts(page: Any, rendering: str) -> list[Any]:
    """(text, its colour, what is below) of all that a workflow shows."""
    return page.evaluate(ELEMENTS) + (page.evaluate(DRAWN) if rendering == "classic" else [])


def faint(page: Any, rendering: str) -> list[tuple[str, float]]:
    """Texts of less than 4.5 that are not the page's own, and their contrast."""
    rows = [(text, round(contrast(*colours), 2)) for text, *colours in texts(page, rendering)]
    return [
        row for row in dict.fromkeys(rows) if row[1] < ENOUGH and not (rendering == "nodes-2" and row[0] in PAGES_OWN)
    ]

use nbd_api::HealthStatus;

use super::super::sample::{ShardRate, VolumeRate};
use super::*;

fn view(volumes: usize) -> View {
    let flow = Flow { iops: 100.0, bandwidth: 409_600.0, latency_us: Some(250.0) };
    let rate = Some(Rate { read: flow, write: Flow::default() });
    let shard = ShardRate {
        shard: 0,
        health: HealthStatus::Ok,
        leader: Some("nbd-1-1".to_owned()),
        sessions: 1,
        lag: Some(0),
        rate,
    };
    let volume = |n| VolumeRate { name: format!("v{n:02}"), shard: 0, sessions: 1, rate };
    let mut view = View::new("http://x".to_owned(), VolumeSort::Iops);
    let rates = Rates { shards: vec![shard], volumes: (0..volumes).map(volume).collect() };
    view.update(rates, &[]);
    view
}

fn screen(view: &mut View, width: usize, height: usize) -> String {
    let lines = view.lines(width, height, false);
    assert_eq!(lines.len(), height);
    for line in &lines {
        assert!(line.width() <= width, "{line}");
    }
    lines.join("\n")
}

#[test]
fn the_screen_is_as_large_as_it_is() {
    let mut view = view(50);
    let text = screen(&mut view, 100, 24);
    assert!(text.contains("VOLUME  SHARD  SESSIONS  READ/s  WRITE/s"), "{text}");
    assert!(text.contains("v00         0         1     100        0  400KiB/s"), "{text}");
    assert!(text.contains("250us"), "{text}");
    for (width, height) in [(1, 1), (20, 5), (300, 100), (80, 2)] {
        screen(&mut view, width, height);
    }
    for line in view.lines(10, 24, true) {
        assert!(!line.contains('\x1b') || line.ends_with("\x1b[0m"), "{line:?}");
    }
}

#[test]
fn keys_scroll_within_the_list() {
    let mut view = view(50);
    screen(&mut view, 80, 24);
    assert_eq!(view.press(Key::Down), Change::Shown);
    let text = screen(&mut view, 80, 24);
    assert!(!text.contains("v00") && text.contains("v01"), "{text}");
    view.press(Key::End);
    let text = screen(&mut view, 80, 24);
    assert!(text.contains("v49") && !text.contains("v01"), "{text}");
    view.press(Key::PageDown);
    assert_eq!(screen(&mut view, 80, 24), text);
    view.press(Key::Home);
    view.press(Key::Up);
    assert!(screen(&mut view, 80, 24).contains("v00"));
}

#[test]
fn keys_change_order_and_rhythm() {
    let mut view = view(3);
    assert_eq!(view.press(Key::Char('n')), Change::Shown);
    assert_eq!(view.press(Key::Char('r')), Change::Shown);
    let text = screen(&mut view, 80, 24);
    assert!(text.contains("by name, turned round"), "{text}");
    assert!(text.find("v02").unwrap() < text.find("v00").unwrap(), "{text}");
    assert_eq!(view.press(Key::Char('-')), Change::Rhythm);
    assert!(screen(&mut view, 80, 24).contains("every 500ms"));
    for _ in 0..20 {
        view.press(Key::Char('+'));
    }
    assert!(screen(&mut view, 80, 24).contains("every 1m"));
    assert_eq!(view.press(Key::Char('q')), Change::End);
    assert_eq!(view.press(Key::CtrlC), Change::End);
    assert_eq!(view.press(Key::Char('x')), Change::Nothing);
}

#[test]
fn trouble_is_told_below_what_was_known() {
    let mut view = view(3);
    view.fail("error: no control API at http://x: connection refused".to_owned());
    let text = screen(&mut view, 80, 24);
    assert!(text.contains("v00"), "{text}");
    assert!(text.lines().last().unwrap().contains("connection refused"), "{text}");
    view.update(Rates::default(), &[1]);
    assert!(screen(&mut view, 80, 24).ends_with("no answer from shard 1"));
}

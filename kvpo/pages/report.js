document.querySelectorAll('.pair').forEach(function (pair) {
  var videos = pair.querySelectorAll('video'), first = videos[0], items = pair.querySelectorAll('li[data-from]');
  function follow() {
    for (var i = 1; i < videos.length; i++)
      if (Math.abs(videos[i].currentTime - first.currentTime) > 0.12) videos[i].currentTime = first.currentTime;
    var at = first.currentTime / (first.duration || 1);
    items.forEach(function (item, i) {
      var stop = i + 1 < items.length ? +items[i + 1].dataset.from : 2;
      item.classList.toggle('now', at >= +item.dataset.from && at < stop);
    });
  }
  first.addEventListener('timeupdate', follow);
  first.addEventListener('seeked', follow);
  first.addEventListener('play', function () { videos.forEach(function (v) { v.play(); }); });
  first.addEventListener('pause', function () { videos.forEach(function (v) { v.pause(); }); });
});
